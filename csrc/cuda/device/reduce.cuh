// Reduction along threadIdx.y in shared memory, in a fixed tree.
#pragma once

#include <cuda_runtime.h>

namespace fastres::cuda {

// Merges `own` of all threads with the same threadIdx.x; the result is that of the thread with threadIdx.y == 0.
// T is a struct of doubles with merge(other). All threads of the block, at most kBlock, must call.
template <int kBlock, typename T>
__device__ __forceinline__ void reduce_along_y(T& own) {
  constexpr int kWords = sizeof(T) / sizeof(double);
  __shared__ double shared[kWords][kBlock / 2];  // word by word: neighbouring threads use neighbouring banks
  const int row = threadIdx.y;
  double* words = reinterpret_cast<double*>(&own);
  for (int rows = blockDim.y; rows > 1;) {
    const int half = (rows + 1) / 2;  // these go on, each with the values of the row that lies `half` behind
    if (row >= half && row < rows) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) shared[w][(row - half) * blockDim.x + threadIdx.x] = words[w];
    }
    __syncthreads();
    if (row + half < rows) {
      T other;
      double* other_words = reinterpret_cast<double*>(&other);
#pragma unroll
      for (int w = 0; w < kWords; ++w) other_words[w] = shared[w][row * blockDim.x + threadIdx.x];
      own.merge(other);
    }
    __syncthreads();
    rows = half;
  }
}

}  // namespace fastres::cuda
