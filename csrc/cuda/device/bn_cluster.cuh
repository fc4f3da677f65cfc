// What the batch norms of clusters share: a thread's vectors, held in shared memory, and sums over the blocks of a cluster.
#pragma once

#include "cuda/bn_cluster.h"
#include "cuda/device/batch_norm.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"

namespace fastres::cuda {

constexpr int kSliceChannels = 64;  // at most
constexpr int kClusterBatch = kUnroll, kBatchesAhead = 6;  // vectors that a thread copies together; such batches on their way

// Of a block, ahead of what it holds.
struct ClusterShared {
  float sums[2][kClusterVec][kThreads + 4];  // of the threads; one more vector, so that a warp reads from all banks
  float counts[kThreads];                    // of their values in a channel
  double parts[3][kThreads];                 // sums of some threads
  double block[3][kSliceChannels];           // of the block, which the others of the cluster read
  float table[5][kSliceChannels];            // values of the channels, and what else threads hand on
};
static_assert(sizeof(ClusterShared) % 16 == 0 && sizeof(ClusterShared) + kClusterBytes <= 227 << 10);

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Where a thread's vectors lie in the tensor.
struct Place {
  int rank;         // of the block
  int vector, row;  // of the slice; of the rows that the block's threads have at once
  int64_t channel;  // the first one
  int count;        // vectors
  int64_t offset, step;

  __device__ explicit Place(const BnClusterPlan& plan) {
    rank = rank_in_cluster();
    vector = threadIdx.x % plan.vectors;
    row = threadIdx.x / plan.vectors;
    channel = (static_cast<int64_t>(blockIdx.x / plan.cluster) * plan.vectors + vector) * kClusterVec;
    const int64_t first = rank * plan.share, left = plan.rows - first;
    const int64_t own = (left < plan.share ? left : plan.share) - row;
    const int at_once = kThreads / plan.vectors;
    count = own > 0 && has_channel(plan) ? static_cast<int>((own + at_once - 1) / at_once) : 0;
    offset = (first + row) * plan.channels + channel;
    step = at_once * plan.channels;
  }

  __device__ bool has_channel(const BnClusterPlan& plan) const { return channel < plan.channels; }
  __device__ int64_t at(int slot) const { return offset + slot * step; }
  __device__ int within(int slot) const { return slot < count ? slot : count - 1; }
};

// The vectors of a tensor that threads copied to shared memory, each its own: no thread waits for another.
template <typename scalar_t>
class Held {
 public:
  using Vector = Vec<scalar_t, kClusterVec>;

  __device__ explicit Held(uint8_t* memory) : memory_(reinterpret_cast<uint4*>(memory) + threadIdx.x) {}

  __device__ void copy(int slot, const scalar_t* from) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) copy_16_bytes(part(slot, i), reinterpret_cast<const uint4*>(from) + i, true);
  }
  __device__ Vector get(int slot) {
    uint4 bits[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) bits[i] = *part(slot, i);
    Vector out;
    memcpy(static_cast<void*>(&out), bits, sizeof out);
    return out;
  }
  __device__ void set(int slot, const Vector& vector) {
    uint4 bits[kParts];
    memcpy(bits, static_cast<const void*>(&vector), sizeof vector);
#pragma unroll
    for (int i = 0; i < kParts; ++i) *part(slot, i) = bits[i];
  }

 private:
  static constexpr int kParts = sizeof(Vector) / 16;

  __device__ uint4* part(int slot, int i) { return memory_ + (slot * kParts + i) * kThreads; }

  uint4* memory_;
};

// Copies of a thread's vectors, some batches ahead of their use.
template <typename Copy>
class Arrivals {
 public:
  __device__ Arrivals(int count, Copy copy) : count_(count), copy_(copy) {
    for (int batch = 0; batch < kBatchesAhead; ++batch) ask();
  }

  // Calls fetch(i, slot) for a batch, then use(i, slot) for each once its copies are there.
  template <typename Fetch, typename Use>
  __device__ void for_each(const Place& place, Fetch fetch, Use use) {
    for (int first = 0; first < count_; first += kClusterBatch) {
#pragma unroll
      for (int i = 0; i < kClusterBatch; ++i) fetch(i, place.within(first + i));
      wait_for_copies<kBatchesAhead - 1>();
#pragma unroll
      for (int i = 0; i < kClusterBatch; ++i)
        if (first + i < count_) use(i, first + i);
      ask();
    }
  }

 private:
  __device__ void ask() {
#pragma unroll
    for (int i = 0; i < kClusterBatch; ++i)
      if (asked_ + i < count_) copy_(asked_ + i);
    asked_ += kClusterBatch;
    commit_copies();
  }

  int count_, asked_ = 0;
  Copy copy_;
};

// The same for what is held already: all of a batch is fetched before the first is used.
template <typename Fetch, typename Use>
__device__ __forceinline__ void for_each_held(const Place& place, Fetch fetch, Use use) {
  for (int first = 0; first < place.count; first += kClusterBatch) {
#pragma unroll
    for (int i = 0; i < kClusterBatch; ++i) fetch(i, place.within(first + i));
#pragma unroll
    for (int i = 0; i < kClusterBatch; ++i)
      if (first + i < place.count) use(i, first + i);
  }
}

// The channel that a thread has where threads divide the slice by channels, and whether it is the first to have it.
struct OwnChannel {
  int in_slice;
  int64_t channel;
  bool is_first;

  __device__ explicit OwnChannel(const BnClusterPlan& plan) {
    const int channels = plan.vectors * kClusterVec;
    in_slice = threadIdx.x % channels;
    channel = static_cast<int64_t>(blockIdx.x / plan.cluster) * channels + in_slice;
    is_first = threadIdx.x < channels && channel < plan.channels;
  }
};

// Merges what read(thread, lane) makes of the sums that each thread left, over the threads of all blocks, in a fixed order: all
// blocks find the same. T is a struct of at most three doubles with merge(other). The result is that of the threads that are
// first to have their channel. All threads of the cluster call, and afterwards wait_for_cluster() before they end.
template <typename T, typename Read>
__device__ __forceinline__ T sums_of_cluster(const BnClusterPlan& plan, ClusterShared& s, const OwnChannel& own, Read read) {
  constexpr int kWords = sizeof(T) / sizeof(double);
  const int channels = plan.vectors * kClusterVec, parts = kThreads / channels;
  __syncthreads();
  T part{};
  for (int row = threadIdx.x / channels; row < kThreads / plan.vectors; row += parts)
    part.merge(read(row * plan.vectors + own.in_slice / kClusterVec, own.in_slice % kClusterVec));
  const double* words = reinterpret_cast<const double*>(&part);
#pragma unroll
  for (int w = 0; w < kWords; ++w) s.parts[w][threadIdx.x] = words[w];
  __syncthreads();

  const auto merged = [&](int count, auto word) {
    T all{}, other;
    double* other_words = reinterpret_cast<double*>(&other);
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) other_words[w] = word(w, i);
      all.merge(other);
    }
    return all;
  };
  if (own.is_first) {
    const T all = merged(parts, [&](int w, int i) { return s.parts[w][i * channels + own.in_slice]; });
    const double* all_words = reinterpret_cast<const double*>(&all);
#pragma unroll
    for (int w = 0; w < kWords; ++w) s.block[w][own.in_slice] = all_words[w];
  }
  sync_cluster(plan.cluster);
  T whole{};
  if (own.is_first) whole = merged(plan.cluster, [&](int w, int rank) { return of_block(s.block[w][own.in_slice], rank); });
  arrive_in_cluster(plan.cluster);
  return whole;
}

// What the first threads left in the table for the channels of this one's vectors.
template <int kRows>
__device__ __forceinline__ void read_table(const ClusterShared& s, const Place& place, float (&own)[kRows][kClusterVec]) {
  __syncthreads();
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int j = 0; j < kClusterVec; ++j) own[row][j] = s.table[row][place.vector * kClusterVec + j];
}

#endif  // 9.0

// Launches the plan's clusters; held: tensors that a block holds.
template <typename scalar_t, typename Params>
cudaError_t launch_plan(void (*kernel)(Params), const Params& params, int held, cudaStream_t stream) {
  const BnClusterPlan& plan = params.plan;
  const size_t bytes = sizeof(ClusterShared) + plan.slots * kThreads * held * kClusterVec * sizeof(scalar_t);
  constexpr int kMost = sizeof(ClusterShared) + kClusterBytes;  // of any plan: other threads launch the same kernel
  const cudaError_t allowed =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  if (allowed != cudaSuccess) return allowed;
  return launch_clusters_behind(kernel, static_cast<unsigned>(plan.blocks()), kThreads, plan.cluster, params, bytes, stream);
}

}  // namespace fastres::cuda
