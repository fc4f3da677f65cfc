// Words of 32 bits in registers: squares of them with rows and columns exchanged, and those made of pairs of bfloat16.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

FASTRES_INLINE void interleave(Sum a, Sum b, Sum& low, Sum& high) {  // a0 b0 a1 b1 ...
#if FASTRES_CPU_LEVEL >= 4
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = (Sum)_mm512_permutex2var_ps((__m512)a, first, (__m512)b);
  high = (Sum)_mm512_permutex2var_ps((__m512)a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), (__m512)b);
#else
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Sum)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Sum)_mm256_permute2f128_ps(even, odd, 0x31);
#endif
}

// Interleaving the halves as many times as the size of the square has bits.
FASTRES_INLINE void transpose(Sum (&rows)[kWide]) {
#pragma GCC unroll 4
  for (int64_t round = 1; round < kWide; round *= 2) {
    Sum next[kWide];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kWide / 2; ++i) interleave(rows[i], rows[i + kWide / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWide; ++i) rows[i] = next[i];
  }
}

#if FASTRES_CPU_LEVEL >= 4
// 32 or 16 values of a row; zeros for a row that does not exist.
FASTRES_INLINE __m512i values(const bf16* from) {
  return from == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(from);
}
FASTRES_INLINE __m512i half_values(const bf16* from) {
  return from == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(0xffff, from);
}

// a_i b_i a_(i+1) ... from a lane on.
FASTRES_INLINE __m512i pairs_of(__m512i a, __m512i b, int64_t first) {
  Vec<uint16_t, 32> lane;
  for (int64_t i = 0; i < 32; ++i) lane[i] = first + i / 2 + i % 2 * 32;
  return _mm512_permutex2var_epi16(a, (__m512i)lane, b);
}
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
