// The inner loop of all convolutions: sums of a tile in registers, a vector of weights times broadcast inputs at a time.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/loops.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

constexpr int64_t kWide = kLanes<float>;
constexpr int kMostPixels = FASTRES_CPU_LEVEL >= 4 ? 7 : 6;   // 7 x 4 sums and 4 vectors of weights: all 32 registers
constexpr int kMostVectors = FASTRES_CPU_LEVEL >= 4 ? 4 : 2;  // 6 x 2 sums, 2 vectors of weights, x: 15 of 16 registers
constexpr int64_t kBlockChannels = kMostVectors * kWide;
constexpr int64_t kWord = 4;
constexpr int64_t kSumWords = 256;  // added up before they join the total: long sums keep the accuracy of short ones
using Sum = Vec<float, kWide>;

// ---- one step of a sum: a word of x times a vector of words of the weights --------------------------

#if FASTRES_CPU_LEVEL >= 4
#define FASTRES_BF16_DOT __attribute__((target("avx512bf16")))
FASTRES_INLINE Sum multiply_add(float, const char* x, Sum weight, Sum sum) {
  float word;
  memcpy(&word, x, kWord);
  return (Sum)_mm512_fmadd_ps(_mm512_set1_ps(word), (__m512)weight, (__m512)sum);
}
FASTRES_BF16_DOT FASTRES_INLINE Sum multiply_add(bf16, const char* x, Sum weight, Sum sum) {
  int word;
  memcpy(&word, x, kWord);
  return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)weight);
}
#else
#define FASTRES_BF16_DOT
FASTRES_INLINE Sum multiply_add(float, const char* x, Sum weight, Sum sum) {
  float word;
  memcpy(&word, x, kWord);
  return (Sum)_mm256_fmadd_ps(_mm256_set1_ps(word), (__m256)weight, (__m256)sum);
}
#endif

// Adds the words [begin, end) of each x, times their vectors of weights, to the sums; returns where the weights go on.
template <typename scalar_t, int kPixels, int kVectors>
FASTRES_BF16_DOT FASTRES_INLINE const float* add_words(Sum (&sum)[kPixels][kVectors], const char* const (&x)[kPixels],
                                                       int64_t begin, int64_t end, const float* weight) {
  for (int64_t word = begin; word < end; ++word, weight += kVectors * kWide) {
    Sum w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load<float, kWide>(weight + v * kWide, Whole{});
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[p][v] = multiply_add(scalar_t{}, x[p] + word * kWord, w[v], sum[p][v]);
  }
  return weight;
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
