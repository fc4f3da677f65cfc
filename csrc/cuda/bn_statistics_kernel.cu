// Formula: mean = sum(x) / n, var = sum((x - mean)^2) / n, n = N * H * W.
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: one read.
// Accumulate type: of x - pivot, float (Welford) in a thread, double between threads and blocks.
// Invariants: fixed order whatever the device; a constant channel has var == 0 exactly; var is not negative.
#include "cuda/bn_statistics.h"
#include "cuda/device/bn_merge.cuh"

namespace fastres::cuda {

constexpr int kPivotSample = 8;

// What a channel is measured from: the mean of its first elements where that is far from zero, so that what is left of x is
// as large as its spread; exact where they are equal. Else 0: taking it off values of both signs would only round them.
__device__ __forceinline__ float pivot_of(const float (&x)[kPivotSample]) {
  float mean = 0.0f, var = 0.0f;
#pragma unroll
  for (int i = 0; i < kPivotSample; ++i) mean += x[i] * (1.0f / kPivotSample);
#pragma unroll
  for (int i = 0; i < kPivotSample; ++i) var += (x[i] - mean) * (x[i] - mean) * (1.0f / kPivotSample);
  return mean * mean > 16.0f * var ? mean : 0.0f;
}

// Offset of element i of the sample: the first one again where there are too few.
__device__ __forceinline__ int64_t pivot_offset(const BnGeometry& g, int64_t channel, int i) {
  if (g.channels_last) return channel + (i < g.elements ? i * g.channels : 0);
  return channel * g.plane + (i < g.plane ? i : 0);
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kChannelsLast ? 3 : 2)
    bn_statistics_kernel(const __grid_constant__ BnStatisticsParams p) {
  const auto* x = static_cast<const typename Traits::scalar_t*>(p.x);
  let_the_next_kernel_start();
  const Tile tile(p.geometry, false);
  const int lane = threadIdx.x * Traits::kLanes;
  const Walk<Traits> walk(p.geometry, tile);
  prefetch_first(walk, x);
  float pivot[Traits::kLanes] = {};
  if (lane < tile.channels) {
    Vec<typename Traits::scalar_t, Traits::kLanes> sample[kPivotSample];
#pragma unroll
    for (int i = 0; i < kPivotSample; ++i)
      sample[i] = load<Traits::kLanes>(x + pivot_offset(p.geometry, tile.channel + lane, i));
#pragma unroll
    for (int j = 0; j < Traits::kLanes; ++j) {
      float values[kPivotSample];
#pragma unroll
      for (int i = 0; i < kPivotSample; ++i) values[i] = to_float(sample[i].v[j]);
      pivot[j] = pivot_of(values);
    }
  }

  // A thread's own positions.
  Moments<Traits::kVec> moments{};
  typename Traits::Vector x_in[kUnroll];
  for_each_vector<kUnroll>(
      walk, [&](int slot, int64_t offset) { x_in[slot] = load<Traits::kVec>(x + offset); },
      [&](int slot, int64_t) {
        float values[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) values[j] = to_float(x_in[slot].v[j]) - pivot[Traits::lane(j)];
        moments.add(values);
      });

  // Those of the block.
  MomentSums<Traits::kLanes> own = [&] {
    if constexpr (Traits::kChannelsLast) return moments.sums();
    else return moments.folded();
  }();
  reduce_along_y<kThreads>(own);
  if (threadIdx.y > 0 || lane >= tile.channels) return;
  float* partial = p.partial + tile.split * 2 * p.geometry.channels + tile.channel + lane;
#pragma unroll
  for (int j = 0; j < Traits::kLanes; ++j) {
    partial[j] = static_cast<float>(own.mean(j));
    partial[p.geometry.channels + j] = static_cast<float>(own.m2(j));
  }
}

__global__ void __launch_bounds__(kMergeThreads) bn_statistics_merge_kernel(const __grid_constant__ BnStatisticsParams p) {
  const BnGeometry& g = p.geometry;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x;
  const int64_t scale = g.channels_last ? 1 : g.vec;  // elements per position
  const auto own = merge_partials<MomentSums<1>>(g, channel, [&](int64_t split) {
    const float* partial = p.partial + split * 2 * g.channels + channel;
    const int64_t left = g.positions - split * g.share;
    const int64_t count = (left < g.share ? left : g.share) * scale;
    return Moments<1>{static_cast<float>(count), {partial[0]}, {partial[g.channels]}}.sums();
  });
  if (threadIdx.y > 0 || channel >= g.channels) return;
  float sample[kPivotSample];
  for (int i = 0; i < kPivotSample; ++i) sample[i] = channel_value({p.x, p.dtype}, pivot_offset(g, channel, i), 0.0f);
  p.mean[channel] = static_cast<float>(pivot_of(sample) + own.mean(0));
  p.var[channel] = static_cast<float>(gpu_relu(own.m2(0) / static_cast<double>(g.elements)));
}

cudaError_t launch_bn_statistics(const BnStatisticsParams& params, cudaStream_t stream) {
  const BnGeometry& g = params.geometry;
  const cudaError_t status = with_bn_traits(params.dtype, g, [&](auto traits) {
    return launch_bn(bn_statistics_kernel<decltype(traits)>, g, params, stream);
  });
  return status == cudaSuccess ? launch_merge(bn_statistics_merge_kernel, g, params, stream) : status;
}

}  // namespace fastres::cuda
