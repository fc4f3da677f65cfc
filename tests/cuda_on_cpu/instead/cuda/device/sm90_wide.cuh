// In the place of csrc/cuda/device/sm90_wide.cuh: the same names, done by fibers.
#pragma once

#include "cuda/device/mma.cuh"
#include "cuda/device/sm90.cuh"

namespace fastres::cuda::sm90 {

template <typename T>
void wide_product(float (&acc)[128], uint64_t a, uint64_t b, int accumulate) {
  product<T, 128>(acc, a, b, accumulate);
}

inline void store_transposed(void* row, const uint32_t (&m)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix that is not aligned to 16 bytes");
  struct Lane {
    void* row;
    uint32_t m[4];
  };
  const Lane* of = gather(Lane{row, {m[0], m[1], m[2], m[3]}});
  const unsigned lane = threadIdx.x % 32, matrix = lane / 8, column = lane % 8;
  // Each lane writes the row whose address it gave: the column of that number of the matrix as it lies in registers.
  for (unsigned g = 0; g < 8; ++g) {
    const uint32_t pair = of[4 * g + column / 2].m[matrix];
    const uint16_t value = static_cast<uint16_t>(column % 2 == 0 ? pair : pair >> 16);
    memcpy(static_cast<uint16_t*>(row) + g, &value, 2);
  }
}

inline void sync_warp() { gather(0); }

}  // namespace fastres::cuda::sm90
