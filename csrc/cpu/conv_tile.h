// The inner loop of all convolutions: sums of a tile in registers, a vector of weights times broadcast inputs at a time.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include <new>
#include <utility>

#include "cpu/conv_bn_act.h"
#include "cpu/loops.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

constexpr int64_t kWide = kLanes<float>;
constexpr int kMostPixels = FASTRES_CPU_LEVEL >= 4 ? 7 : 6;   // 7 x 4 sums and 4 vectors of weights: all 32 registers
constexpr int kMostVectors = FASTRES_CPU_LEVEL >= 4 ? 4 : 2;  // 6 x 2 sums, 2 vectors of weights, x: 15 of 16 registers
constexpr int64_t kBlockChannels = kMostVectors * kWide;
constexpr int64_t kWord = 4;
alignas(64) inline constexpr char kZeros[kConvMostRun * kWord] = {};  // what a tap in the padding reads
constexpr int64_t kSumWords = 256;  // added up before they join the total: long sums keep the accuracy of short ones
using Sum = Vec<float, kWide>;
using IntSum = Vec<int32_t, kWide>;

// Memory for a call of a kernel, in whole cache lines.
class Lines {
 public:
  explicit Lines(int64_t bytes) : bytes_(static_cast<char*>(::operator new[](bytes, kLine))) {}
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { ::operator delete[](bytes_, kLine); }
  char* get() const { return bytes_; }

 private:
  static constexpr std::align_val_t kLine{64};
  char* const bytes_;
};

FASTRES_INLINE bool is_finite(Sum v) {
  const Sum nothing = v - v;
#if FASTRES_CPU_LEVEL >= 4
  return _mm512_cmp_ps_mask((__m512)nothing, (__m512)nothing, _CMP_UNORD_Q) == 0;
#else
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)nothing, (__m256)nothing, _CMP_UNORD_Q)) == 0;
#endif
}

// ---- one step of a sum: words of x, the same for all lanes or each lane's own, times a vector of words of the weights -----

#if FASTRES_CPU_LEVEL >= 4
#define FASTRES_DOT __attribute__((target("avx512bf16,avx512vnni")))
FASTRES_INLINE Sum everywhere(const char* x) {
  int word;
  memcpy(&word, x, kWord);
  return (Sum)_mm512_set1_epi32(word);
}
FASTRES_INLINE Sum permuted(Sum x, IntSum lanes) {
  return (Sum)_mm512_maskz_permutexvar_epi32(0xffff, (__m512i)lanes, (__m512i)x);
}
FASTRES_INLINE Sum multiply_add(float, Sum x, Sum weight, Sum sum) {
  return (Sum)_mm512_fmadd_ps((__m512)x, (__m512)weight, (__m512)sum);
}
FASTRES_DOT FASTRES_INLINE Sum multiply_add(bf16, Sum x, Sum weight, Sum sum) {
  return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
}
FASTRES_DOT FASTRES_INLINE IntSum multiply_add(uint8_t, Sum x, Sum weight, IntSum sum) {  // exact
  return (IntSum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weight);
}
#else
#define FASTRES_DOT
FASTRES_INLINE Sum everywhere(const char* x) {
  float word;
  memcpy(&word, x, kWord);
  return (Sum)_mm256_set1_ps(word);
}
FASTRES_INLINE Sum permuted(Sum x, IntSum lanes) { return (Sum)_mm256_permutevar8x32_ps((__m256)x, (__m256i)lanes); }
FASTRES_INLINE Sum multiply_add(float, Sum x, Sum weight, Sum sum) {
  return (Sum)_mm256_fmadd_ps((__m256)x, (__m256)weight, (__m256)sum);
}
#endif

// The first bytes of a vector.
template <int64_t kBytes>
FASTRES_INLINE Sum words_of(const char* x) {
  Sum words{};
  memcpy(&words, x, kBytes);
  return words;
}

// Weights that are needed after those being multiplied, and meanwhile prefetched into the second-level cache, `lines` of them for
// every 16 words. Without this one image of ResNet-50 took 1.02 to 1.06 times as long (AMD EPYC, 2026-11-25).
struct Coming {
  const char* from;
  int64_t lines;
};

// What follows `weight` in memory, fetched in `turns` turns, of which this is number `turn`; each goes through `words` words.
// At the end of a network's layer these are the weights of the next one.
FASTRES_INLINE Coming coming_after(const float* weight, int64_t words, int64_t vectors, int64_t turn, int64_t turns) {
  const char* next = reinterpret_cast<const char*>(weight) + words * vectors * kVectorBytes;
  return {next + turn * words * vectors / turns * kVectorBytes, ceil_div(vectors * 16 * kVectorBytes / 64, turns)};
}

// Adds the words [begin, end) of each x from kFirst to kLast, times their vectors of weights, to the sums; returns where the
// weights go on.
template <typename scalar_t, int kFirst, int kLast, typename Total, int kPixels, int kVectors>
FASTRES_DOT FASTRES_INLINE const float* add_words_of(Total (&sum)[kPixels][kVectors], const char* const (&x)[kPixels],
                                                     int64_t begin, int64_t end, const float* weight, Coming& coming) {
  for (int64_t word = begin; word < end; ++word, weight += kVectors * kWide) {
    if (word % 16 == 0)
      for (int64_t i = 0; i < coming.lines; ++i, coming.from += 64) __builtin_prefetch(coming.from, 0, 2);
    Sum w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load<float, kWide>(weight + v * kWide, Whole{});
#pragma GCC unroll 8
    for (int p = kFirst; p <= kLast; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[p][v] = multiply_add(scalar_t{}, everywhere(x[p] + word * kWord), w[v], sum[p][v]);
  }
  return weight;
}

// The same for all x. In whole tiles the first or the last pixel is left out if it lies in the padding: 9 % of a 3x3
// convolution's work where images are 7 pixels wide.
template <typename scalar_t, typename Total, int kPixels, int kVectors>
FASTRES_DOT FASTRES_INLINE const float* add_words(Total (&sum)[kPixels][kVectors], const char* const (&x)[kPixels],
                                                  int64_t begin, int64_t end, const float* weight, Coming& coming) {
  if constexpr (kPixels == kMostPixels) {
    if (x[0] == kZeros) return add_words_of<scalar_t, 1, kPixels - 1>(sum, x, begin, end, weight, coming);
    if (x[kPixels - 1] == kZeros) return add_words_of<scalar_t, 0, kPixels - 2>(sum, x, begin, end, weight, coming);
  }
  return add_words_of<scalar_t, 0, kPixels - 1>(sum, x, begin, end, weight, coming);
}

// Brings the lines that a tile will write into this core's cache while its sums are computed. (1.01 to 1.02 times the speed of
// ResNet-50 at batch 8 in bfloat16. AMD EPYC, 2026-11-25.)
template <int64_t kCount, typename T>
FASTRES_INLINE void own(T* to) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < kCount; i += 64 / static_cast<int64_t>(sizeof(T))) asm volatile("prefetchw %0" : : "m"(to[i]));
}

// The same for what it will read and add to them.
template <int64_t kCount, typename T>
FASTRES_INLINE void prefetch(const T* from) {
#pragma GCC unroll 4
  for (int64_t i = 0; i < kCount; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// ---- tiles of the output ----------------------------------------------------------------------------

// Where the taps of the kPixels neighbouring output pixels from `pixel` on begin.
template <int kPixels>
struct Window {
  int64_t row[kPixels], col[kPixels];  // of the first tap: negative in the padding
  const char* first[kPixels];

  FASTRES_INLINE Window(const ConvArgs& args, int64_t pixel) {
    if (args.dense) {  // every pixel of x is a pixel of y
      for (int p = 0; p < kPixels; ++p) {
        row[p] = col[p] = 0;
        first[p] = static_cast<const char*>(args.x) + (pixel + p) * args.pixel_step;
      }
      return;
    }
    const int64_t line = pixel / args.out_w;
    int64_t image = line / args.out_h, y = line % args.out_h, x = pixel % args.out_w;
    for (int p = 0; p < kPixels; ++p) {
      row[p] = y * args.stride_h - args.pad_h;
      col[p] = x * args.stride_w - args.pad_w;
      first[p] = static_cast<const char*>(args.x) + image * args.image_step + row[p] * args.row_step + col[p] * args.pixel_step;
      if (++x == args.out_w) {
        x = 0;
        if (++y == args.out_h) y = 0, ++image;
      }
    }
  }

  // Whether a row of taps lies in the padding for every pixel.
  FASTRES_INLINE bool is_outside(const ConvArgs& args, int64_t down) const {
    for (int p = 0; p < kPixels; ++p)
      if (static_cast<uint64_t>(row[p] + down) < static_cast<uint64_t>(args.height)) return false;
    return true;
  }

  FASTRES_INLINE const char* tap(const ConvArgs& args, int p, int64_t down, int64_t right) const {
    const bool inside = static_cast<uint64_t>(row[p] + down) < static_cast<uint64_t>(args.height) &&
                        static_cast<uint64_t>(col[p] + right) < static_cast<uint64_t>(args.width);
    return inside ? first[p] + down * args.row_step + right * args.pixel_step : kZeros;
  }
};

// Runs the tiles of the units [begin, end) of a convolution:
// run(place in a table of TileShapes, weight, coming, pixel, channel, last).
template <typename Run>
FASTRES_INLINE void for_tiles(const ConvArgs& args, int64_t begin, int64_t end, Run run) {
  const int64_t pixels = args.images * args.out_h * args.out_w, tiles = ceil_div(pixels, kMostPixels);
  const int64_t blocks = ceil_div(args.out_channels, kBlockChannels), depth = conv_depth(args);
  const auto run_block = [&](int64_t block, int64_t first, int64_t stop) {
    const int64_t channel = block * kBlockChannels, channels = min(kBlockChannels, args.out_channels - channel);
    const int64_t vectors = ceil_div(channels, kWide);
    const auto* weight = static_cast<const float*>(args.weight) + channel * depth;
    for (int64_t at = first; at < stop; ++at) {
      const int64_t pixel = at * kMostPixels, place = (min(kMostPixels, pixels - pixel) - 1) * kMostVectors + vectors - 1;
      const Coming coming = coming_after(weight, depth, vectors, at - first, stop - first);
      run(place, weight, coming, pixel, channel, channels - (vectors - 1) * kWide);
    }
  };
  if (args.share_channels) {
    for (int64_t at = begin, count; at < end; at += count) {
      count = min(end - at, tiles - at % tiles);
      run_block(at / tiles, at % tiles, at % tiles + count);
    }
    return;
  }
  for (int64_t first = begin; first < end; first += args.block)
    for (int64_t block = 0; block < blocks; ++block) run_block(block, first, min(first + args.block, end));
}
using TileShapes = std::make_integer_sequence<int, kMostPixels * kMostVectors>;

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
