// What kernels share whose blocks, one a multiprocessor, walk tiles: their number, and their places in rings of buffers.
#pragma once

#include <cuda_runtime_api.h>

namespace fastres::cuda {

// Of the current device; 0 where there is none.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 0;
}

// A place in a ring, and the parity of the phase of its barriers.
template <int kCount>
struct Slot {
  int index = 0, parity = 0;

  __device__ void next() {
    if (++index == kCount) index = 0, parity ^= 1;
  }
};

}  // namespace fastres::cuda
