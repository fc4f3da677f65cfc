// The merge of the partial results that the blocks of a reduction leave in a workspace of [splits, 2, channels] floats.
#pragma once

#include "cuda/device/batch_norm.cuh"
#include "cuda/device/reduce.cuh"

namespace fastres::cuda {

constexpr int kMergeChannels = 8;  // of a block: one 32-byte sector of a row of partials
constexpr int kMergeThreads = 512;
constexpr int kMergeLoads = 8;     // partials that a thread has in flight

// Merges the channel's partials, read(split), in a fixed order; the result is that of the threads with threadIdx.y == 0.
// Threads beyond the last channel must call too.
template <typename T, typename Read>
__device__ __forceinline__ T merge_partials(const BnGeometry& g, int64_t channel, Read read) {
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  T own{};
  const int64_t splits = channel < g.channels ? g.splits : 0;
  for (int64_t first = threadIdx.y; first < splits; first += kMergeLoads * blockDim.y) {
    T part[kMergeLoads];
#pragma unroll
    for (int i = 0; i < kMergeLoads; ++i) {
      const int64_t split = first + i * blockDim.y;
      part[i] = split < splits ? read(split) : T{};
    }
#pragma unroll
    for (int i = 0; i < kMergeLoads; ++i) own.merge(part[i]);
  }
  reduce_along_y<kMergeThreads>(own);
  return own;
}

template <typename Params>
cudaError_t launch_merge(void (*kernel)(Params), const BnGeometry& g, const Params& params, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(g.channels, kMergeChannels)));
  return launch_behind(kernel, grid, dim3(kMergeChannels, kMergeThreads / kMergeChannels), params, stream);
}

}  // namespace fastres::cuda
