// The tile registers of AMX, named here so that any compiler will do: eight of at most 16 rows of 64 bytes. A convolution keeps
// sums in 0 to 3 (two of pixels by two of channels), pixels in 4 and 5, weights in 6 and 7.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/types.h"

namespace fastres::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

// Whether this machine multiplies tiles of bfloat16 and of 8-bit integers, and Linux, once asked, lets this process use them.
bool has_amx();

#if defined(__x86_64__)
template <int kTile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows that lie `step` bytes apart.
template <int kTile>
inline void load_tile(const void* from, int64_t step) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(step), "i"(kTile) : "memory");
}

template <int kTile>
inline void store_tile(void* to, int64_t step) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(step), "i"(kTile) : "memory");
}

// sum += left * right: pairs of bfloat16 into float, or fours of unsigned by signed bytes into int32.
template <typename scalar_t, int kSum, int kLeft, int kRight>
inline void multiply_tiles() {
  if constexpr (std::is_same_v<scalar_t, bf16>)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
  else
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
}

struct alignas(64) TileSizes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a row
  uint8_t rows[16] = {};
};
inline void configure_tiles(const TileSizes& sizes) { asm volatile("ldtilecfg %0" ::"m"(sizes)); }
inline void release_tiles() { asm volatile("tilerelease"); }
#endif

}  // namespace fastres::cpu
