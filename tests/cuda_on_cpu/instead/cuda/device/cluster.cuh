// In the place of csrc/cuda/device/cluster.cuh: the same names, done by fibers.
#pragma once

#include "cuda/device/mma.cuh"

namespace fastres::cuda {

template <typename Params>
cudaError_t launch_clusters_behind(void (*kernel)(Params), unsigned blocks, unsigned threads, unsigned cluster,
                                   const Params& params, size_t bytes, cudaStream_t) {
  if (cluster > kMostBlocks || bytes > kMostShared) return cudaErrorInvalidValue;
  return cuda_on_cpu::run(dim3(blocks), dim3(threads), [&] { kernel(params); }, cluster);
}

inline int rank_in_cluster() { return static_cast<int>(cuda_on_cpu::rank()); }

struct ClusterBarrier {
  unsigned come, round;
  unsigned round_of[cuda_on_cpu::kMaxFibers];  // in which each thread came
};
inline ClusterBarrier cluster_barrier;

inline void arrive_in_cluster(int blocks) {
  ClusterBarrier& b = cluster_barrier;
  b.round_of[cuda_on_cpu::fiber()] = b.round;
  if (++b.come == blocks * blockDim.x) b.come = 0, ++b.round;
}
inline void wait_for_cluster(int) {
  cuda_on_cpu::wait_until([own = cluster_barrier.round_of[cuda_on_cpu::fiber()]] { return cluster_barrier.round != own; });
}
inline void sync_cluster(int blocks) {
  arrive_in_cluster(blocks);
  wait_for_cluster(blocks);
}

// Late in every other block: what a block reads must be there until all have said that they are done.
template <typename T>
T of_block(const T& own, int rank) {
  if (cuda_on_cpu::rank() % 2 == 1) cuda_on_cpu::pause(1);
  if (cuda_on_cpu::has_ended(rank)) throw std::runtime_error("a read of the memory of a block that has ended");
  const ptrdiff_t away = (rank - rank_in_cluster()) * kMostShared;
  return *reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(&own) + away);
}

}  // namespace fastres::cuda
