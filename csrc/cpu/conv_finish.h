// What follows the sums of a convolution: bias, residual, activation or scale, one rounding, and the store.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/conv_int8.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

// With 0 this is relu: NaN passes and -0.0 stays, since the instruction then gives its second operand.
FASTRES_INLINE Sum at_least(float floor, Sum v) {
#if FASTRES_CPU_LEVEL >= 4
  return (Sum)_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(floor), (__m512)v);
#else
  return (Sum)_mm256_max_ps(_mm256_set1_ps(floor), (__m256)v);
#endif
}

FASTRES_INLINE float floor_of(const ConvArgs& args) { return args.act == Act::kRelu ? 0.0f : -__builtin_inff(); }

// One vector of outputs, of any kind, at an offset of y and of the residual, if there is one.
template <typename scalar_t, typename Lanes>
FASTRES_INLINE void finish(const ConvArgs& args, Sum sum, const float* bias, scalar_t* y, const scalar_t* residual,
                           int64_t at, Lanes lanes) {
  Sum value = sum + load<float, kWide>(bias, lanes);
  if (residual != nullptr) value += load<float, kWide>(residual + at, lanes);
  store<kWide>(y + at, at_least(floor_of(args), value), lanes);
}

// Two neighbouring vectors. In bfloat16 one instruction rounds both; like the one that multiplies, it takes subnormals for zero.
template <typename scalar_t>
FASTRES_DOT FASTRES_INLINE void store_two(scalar_t* to, Sum a, Sum b) {
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (sizeof(scalar_t) == 2) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
    return;
  }
#endif
  store<kWide>(to, a, Whole{});
  store<kWide>(to + kWide, b, Whole{});
}

// A tile of whole vectors, without a branch.
template <bool kResidual, typename scalar_t, int kPixels, int kVectors>
FASTRES_DOT FASTRES_INLINE void finish_tile(const ConvArgs& args, const Sum (&sum)[kPixels][kVectors], const float* bias,
                                            scalar_t* y, const scalar_t* residual) {
  const float floor = floor_of(args);
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p) {
    Sum value[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      value[v] = sum[p][v] + load<float, kWide>(bias + v * kWide, Whole{});
      if constexpr (kResidual) value[v] += load<float, kWide>(residual + p * args.out_step + v * kWide, Whole{});
      value[v] = at_least(floor, value[v]);
    }
    scalar_t* to = y + p * args.out_step;
#pragma GCC unroll 8
    for (int v = 0; v + 1 < kVectors; v += 2) store_two(to + v * kWide, value[v], value[v + 1]);
    if constexpr (kVectors % 2 == 1) store<kWide>(to + (kVectors - 1) * kWide, value[kVectors - 1], Whole{});
  }
}

#if FASTRES_CPU_LEVEL >= 4
// ---- of 8-bit integers ----

FASTRES_INLINE __m512 affine(IntSum sum, const float* scale, const float* bias, __mmask16 mask) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps((__m512i)sum), _mm512_maskz_loadu_ps(mask, scale), _mm512_maskz_loadu_ps(mask, bias));
}

// 64 channels of one pixel, in packed order.
template <bool kResidual>
FASTRES_INLINE void finish_packed(const ConvInt8Args& args, const IntSum (&sum)[4], const float* scale, const float* bias,
                                  const uint8_t* residual, uint8_t* y) {
  __m512i part[4];
  if constexpr (kResidual) {
    const __m512i zero = _mm512_setzero_si512(), r = _mm512_loadu_si512(residual);
    const __m512i low = _mm512_unpacklo_epi8(r, zero), high = _mm512_unpackhi_epi8(r, zero);
    part[0] = _mm512_unpacklo_epi16(low, zero), part[1] = _mm512_unpackhi_epi16(low, zero);
    part[2] = _mm512_unpacklo_epi16(high, zero), part[3] = _mm512_unpackhi_epi16(high, zero);
  }
  const __m512 residual_scale = _mm512_set1_ps(args.residual_scale);
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    __m512 value = affine(sum[v], scale + v * kWide, bias + v * kWide, 0xffff);
    if constexpr (kResidual) value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part[v]), residual_scale, value);
    part[v] = _mm512_cvtps_epi32(value);
  }
  _mm512_storeu_si512(y, _mm512_packus_epi16(_mm512_packs_epi32(part[0], part[1]), _mm512_packs_epi32(part[2], part[3])));
}

// One vector of channels of one pixel, in their own order.
FASTRES_INLINE void finish(const ConvInt8Args& args, IntSum sum, const float* scale, const float* bias, int64_t at,
                           __mmask16 mask) {
  __m512 value = affine(sum, scale, bias, mask);
  if (args.conv.residual != nullptr) {
    const __m128i r = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(args.conv.residual) + at);
    value = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(r)), _mm512_set1_ps(args.residual_scale), value);
  }
  if (args.float_y) {
    _mm512_mask_storeu_ps(static_cast<float*>(args.conv.y) + at, mask, value);
  } else {
    const __m512i least = _mm512_max_epi32(_mm512_cvtps_epi32(value), _mm512_setzero_si512());
    _mm_mask_storeu_epi8(static_cast<uint8_t*>(args.conv.y) + at, mask, _mm512_cvtusepi32_epi8(least));
  }
}
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
