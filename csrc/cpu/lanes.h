// Vectors of float or double, and conversions between lanes of different types, all in registers.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/types.h"

#if !defined(FASTRES_CPU_LEVEL) || FASTRES_CPU_LEVEL == 1
#define FASTRES_LEVEL v1
#elif FASTRES_CPU_LEVEL == 3
#define FASTRES_LEVEL v3
#else
#define FASTRES_LEVEL v4
#endif
#define FASTRES_INLINE inline __attribute__((always_inline))

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
constexpr int64_t kVectorBytes = 64;
#elif FASTRES_CPU_LEVEL == 3
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T, int64_t L>
struct VecOf {
  typedef T type __attribute__((vector_size(L * sizeof(T))));
};
template <typename T, int64_t L>
using Vec = typename VecOf<T, L>::type;

// The type that a storage type computes in, and how many of it fill a register.
template <typename scalar_t>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename scalar_t>
using acc_of = typename AccOf<scalar_t>::type;
template <typename T>
constexpr int64_t kLanes = kVectorBytes / static_cast<int64_t>(sizeof(T));

template <typename To, typename From>
FASTRES_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

FASTRES_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- 16-bit formats <-> float ------------------------------------------------------------------------------------------

// Between lanes of different sizes. GCC builds such conversions from halves, so whole registers get their instruction.
template <int64_t L>
FASTRES_INLINE Vec<uint32_t, L> to_32(Vec<uint16_t, L> h) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16) return (Vec<uint32_t, L>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#endif
#if FASTRES_CPU_LEVEL >= 3
  if constexpr (L == 8) return (Vec<uint32_t, L>)_mm256_cvtepu16_epi32((__m128i)h);
#endif
  return __builtin_convertvector(h, Vec<uint32_t, L>);
}

template <int64_t L>
FASTRES_INLINE Vec<uint16_t, L> to_16(Vec<uint32_t, L> u) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16) return (Vec<uint16_t, L>)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)u);
#endif
#if FASTRES_CPU_LEVEL >= 3
  if constexpr (L == 8) {  // values fit in 16 bits: no saturation
    const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
    return (Vec<uint16_t, L>)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
  }
#endif
  return __builtin_convertvector(u, Vec<uint16_t, L>);
}

template <int64_t L, typename V>
FASTRES_INLINE Vec<double, L> to_double(V v) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 8 && sizeof(V) == 32) return (Vec<double, L>)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#endif
  return __builtin_convertvector(v, Vec<double, L>);
}

#if FASTRES_CPU_LEVEL >= 4
// A bf16 is the upper half of a float: one permutation of 16-bit lanes puts 16 of them there, one takes them out.
FASTRES_INLINE __m512i lanes_16(int64_t numerator, int64_t denominator, int64_t first) {
  Vec<uint16_t, 32> lane;
  for (int64_t i = 0; i < 32; ++i) lane[i] = i * numerator / denominator + first;
  return (__m512i)lane;
}
#endif

template <int64_t L>
FASTRES_INLINE Vec<float, L> widen(bf16, Vec<uint16_t, L> h) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16)
    return (Vec<float, L>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, lanes_16(1, 2, 0), _mm512_castsi256_si512((__m256i)h));
#endif
  return bits_as<Vec<float, L>>(to_32<L>(h) << 16);
}

// To nearest even. A NaN that arithmetic or a bf16 tensor gave has a bit in its upper half; rounded, it could become infinity.
template <int64_t L>
FASTRES_INLINE Vec<uint16_t, L> narrow(bf16, Vec<float, L> v) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16) {
    const auto number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
    const auto odd = _mm512_mask_test_epi32_mask(number, (__m512i)v, _mm512_set1_epi32(1 << 16));
    auto u = _mm512_mask_add_epi32((__m512i)v, number, (__m512i)v, _mm512_set1_epi32(0x7fff));
    u = _mm512_mask_add_epi32(u, odd, u, _mm512_set1_epi32(1));
    const __m512i upper = _mm512_maskz_permutexvar_epi16(~0u, lanes_16(2, 1, 1), u);
    return (Vec<uint16_t, L>)_mm512_maskz_extracti64x4_epi64(0xff, upper, 0);
  }
#endif
  const auto u = bits_as<Vec<uint32_t, L>>(v);
  const auto rounded = u + (((u >> 16) & 1) + 0x7fff);
  return to_16<L>((v == v ? rounded : u) >> 16);
}

// The conversion instruction where the level has it (F16C, AVX-512), else integer arithmetic.
template <int64_t L>
FASTRES_INLINE Vec<float, L> widen(fp16, Vec<uint16_t, L> h) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16) return (Vec<float, L>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)h);
#endif
#if FASTRES_CPU_LEVEL >= 3
  if constexpr (L == 8) return (Vec<float, L>)_mm256_cvtph_ps((__m128i)h);
#endif
  const auto u = to_32<L>(h);
  const auto magnitude = (u & 0x7fff) << 13;
  const auto rebiased = magnitude + (112u << 23);
  const auto special = magnitude + (224u << 23);                                        // infinity, NaN
  const auto magic = bits_as<Vec<float, L>>(Vec<uint32_t, L>{} + (113u << 23));         // 2^-14
  const auto tiny = bits_as<Vec<float, L>>(magnitude + (113u << 23)) - magic;           // zero, subnormals
  auto bits = magnitude >= (0x7c00u << 13) ? special : rebiased;
  bits = magnitude < (1u << 23) ? bits_as<Vec<uint32_t, L>>(tiny) : bits;
  return bits_as<Vec<float, L>>(bits | (u & 0x8000) << 16);
}

template <int64_t L>
FASTRES_INLINE Vec<uint16_t, L> narrow(fp16, Vec<float, L> v) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (L == 16) return (Vec<uint16_t, L>)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#endif
#if FASTRES_CPU_LEVEL >= 3
  if constexpr (L == 8) return (Vec<uint16_t, L>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#endif
  const auto u = bits_as<Vec<uint32_t, L>>(v);
  const auto magnitude = u & 0x7fffffff;
  const auto rebiased = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const auto magic = Vec<uint32_t, L>{} + (126u << 23);  // 0.5: its last bit is worth 2^-24, the smallest subnormal
  const auto tiny = bits_as<Vec<uint32_t, L>>(bits_as<Vec<float, L>>(magnitude) + bits_as<Vec<float, L>>(magic)) - magic;
  const auto infinity = Vec<uint32_t, L>{} + 0x7c00;
  const auto nan = Vec<uint32_t, L>{} + 0x7e00;
  auto bits = magnitude < (113u << 23) ? tiny : rebiased;
  bits = magnitude >= (143u << 23) ? infinity : bits;
  bits = v != v ? nan : bits;
  return to_16<L>(bits | (u & 0x80000000) >> 16);
}

}  // namespace fastres::cpu::FASTRES_LEVEL
