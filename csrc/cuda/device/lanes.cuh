// What the lanes of a warp hand to one another.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastres::cuda {

// What that lane holds; all lanes of the warp take part.
__device__ __forceinline__ uint32_t from_lane(uint32_t own, int lane) { return __shfl_sync(~0u, own, lane); }

// The value is made here and kept, not what it is made of.
__device__ __forceinline__ int settled(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

}  // namespace fastres::cuda
