// Clusters of blocks, from compute capability 9.0 on: their launch, their barrier, the shared memory of the other blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

// Launches clusters of blocks that may begin while the kernel before them in the stream ends, for which they wait themselves.
template <typename Params>
cudaError_t launch_clusters_behind(void (*kernel)(Params), unsigned blocks, unsigned threads, unsigned cluster,
                                   const Params& params, size_t shared_bytes, cudaStream_t stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config{dim3(blocks), dim3(threads), shared_bytes, stream, attributes, 2};
  return cudaLaunchKernelEx(&config, kernel, params);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ int rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A thread says that it has come, and later waits until all threads of the cluster, of so many blocks, have said so: what they
// wrote to shared memory before, it sees.
__device__ __forceinline__ void arrive_in_cluster(int) { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster(int) { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ void sync_cluster(int blocks) {
  arrive_in_cluster(blocks);
  wait_for_cluster(blocks);
}

// What another block, or this one, has in this place of its shared memory. That block must not have ended.
template <typename T>
__device__ __forceinline__ T of_block(const T& own, int rank) {
  const T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(&own), "r"(rank));
  return *there;
}

#endif  // 9.0

}  // namespace fastres::cuda
