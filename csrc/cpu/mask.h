// The mask of a ReLU at the end of a block, one bit per element: bit i % 8 of byte i / 8 is element i in memory order, set
// where the gradient passes, that is where not (y <= 0). Whoever writes bits writes them in order.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/lanes.h"

namespace fastres::cpu::FASTRES_LEVEL {

// Bit l: whether not (v[l] <= most).
template <int64_t L, typename acc_t>
FASTRES_INLINE uint32_t bits_above(Vec<acc_t, L> v, acc_t most) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (sizeof(acc_t) == 8) return _mm512_cmp_pd_mask((__m512d)v, _mm512_set1_pd(most), _CMP_NLE_UQ);
  else return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(most), _CMP_NLE_UQ);
#elif FASTRES_CPU_LEVEL == 3
  if constexpr (sizeof(acc_t) == 8) return _mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, _mm256_set1_pd(most), _CMP_NLE_UQ));
  else return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(most), _CMP_NLE_UQ));
#elif defined(__x86_64__)
  if constexpr (sizeof(acc_t) == 8) return _mm_movemask_pd(_mm_cmpnle_pd((__m128d)v, _mm_set1_pd(most)));
  else return _mm_movemask_ps(_mm_cmpnle_ps((__m128)v, _mm_set1_ps(most)));
#else
  uint32_t bits = 0;
  for (int64_t l = 0; l < L; ++l) bits |= uint32_t{!(v[l] <= most)} << l;
  return bits;
#endif
}

// v where its bit is set, else zero.
template <int64_t L, typename acc_t>
FASTRES_INLINE Vec<acc_t, L> where_bits(uint32_t bits, Vec<acc_t, L> v) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (sizeof(acc_t) == 8) return (Vec<acc_t, L>)_mm512_maskz_mov_pd(bits, (__m512d)v);
  else return (Vec<acc_t, L>)_mm512_maskz_mov_ps(bits, (__m512)v);
#else
  decltype(v < v) own{};
  for (int64_t l = 0; l < L; ++l) own[l] = int64_t{1} << l;
  return (own & static_cast<decltype(+own[0])>(bits)) != 0 ? v : Vec<acc_t, L>{};
#endif
}

constexpr uint32_t first_bits(int64_t n) { return (1u << n) - 1; }

// Elements [i, i + n), n <= 16. kWhole: whole bytes of a channels_last tensor's vector.
template <int64_t L, bool kWhole>
FASTRES_INLINE uint32_t load_bits(const uint8_t* mask, int64_t i, int64_t n) {
  if constexpr (kWhole && L == 16) {
    uint16_t bits;
    memcpy(&bits, mask + i / 8, 2);
    return bits;
  } else if constexpr (kWhole && L == 8) {
    return mask[i / 8];
  } else {
    const int64_t first = i % 8;
    uint32_t bits = mask[i / 8];
    if (first + n > 8) bits |= uint32_t{mask[i / 8 + 1]} << 8;
    if (first + n > 16) bits |= uint32_t{mask[i / 8 + 2]} << 16;
    return bits >> first;
  }
}

// What follows in the last byte is cleared.
template <int64_t L, bool kWhole>
FASTRES_INLINE void store_bits(uint8_t* mask, int64_t i, int64_t n, uint32_t bits) {
  if constexpr (kWhole && L == 16) {
    const auto both = static_cast<uint16_t>(bits);
    memcpy(mask + i / 8, &both, 2);
  } else if constexpr (kWhole && L == 8) {
    mask[i / 8] = static_cast<uint8_t>(bits);
  } else {
    const int64_t first = i % 8;
    bits = (bits & first_bits(n)) << first;
    if (first > 0) bits |= mask[i / 8] & first_bits(first);
    for (int64_t k = 0; 8 * k < first + n; ++k) mask[i / 8 + k] = static_cast<uint8_t>(bits >> 8 * k);
  }
}

}  // namespace fastres::cpu::FASTRES_LEVEL
