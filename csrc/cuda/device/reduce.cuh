// Reduction along threadIdx.y in shared memory, in a fixed tree.
#pragma once

#include <cuda_runtime.h>

namespace fastres::cuda {

// Merges `own` of all threads with the same threadIdx.x; the result is that of the thread with threadIdx.y == 0.
// T is a struct of floats with merge(other). All threads of the block, at most kBlock, must call.
template <int kBlock, typename T>
__device__ __forceinline__ void reduce_along_y(T& own) {
  constexpr int kWords = sizeof(T) / sizeof(float);
  __shared__ float shared[kWords][kBlock];  // word by word: neighbouring threads use neighbouring banks
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int rows = blockDim.y;
  const int row = threadIdx.y;
  float* words = reinterpret_cast<float*>(&own);
#pragma unroll
  for (int w = 0; w < kWords; ++w) shared[w][thread] = words[w];
  __syncthreads();

  int stride = 1;
  while (stride < rows) stride *= 2;
  for (stride /= 2; stride > 0; stride /= 2) {
    if (row < stride && row + stride < rows) {
      T other;
      float* other_words = reinterpret_cast<float*>(&other);
#pragma unroll
      for (int w = 0; w < kWords; ++w) other_words[w] = shared[w][thread + stride * blockDim.x];
      own.merge(other);
#pragma unroll
      for (int w = 0; w < kWords; ++w) shared[w][thread] = words[w];
    }
    __syncthreads();
  }
}

}  // namespace fastres::cuda
