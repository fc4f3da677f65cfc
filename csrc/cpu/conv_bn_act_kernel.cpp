// Formula: y = act(conv2d(x, weight) + bias [+ residual]), batch norm folded into weight and bias.
// Layout: channels last; a tile of pixels by channels stays in registers while all taps and input channels are added up.
// Bytes per output: x once per block of channels, mostly from L2, weights once per block of pixels, residual and y once.
// Accumulate type: float, in blocks, in the order of taps and channels; then bias and residual; one rounding, at the end.
// Invariants: an output's sum is the same in every tile and for any number of threads; padding is a run of zeros.
#include "cpu/conv_bn_act.h"

#include "cpu/conv_tile.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // totals are read where there are any
#endif

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

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

// One tile of kPixels by kVectors vectors, from `pixel` and `channel` on; `last` lanes of the last vector exist.
template <typename scalar_t, int kPixels, int kVectors, bool kGroups = false>
FASTRES_DOT __attribute__((noinline)) void tile(const ConvArgs& args, const float* weight, Coming coming, int64_t pixel,
                                                     int64_t channel, int64_t last) {
  const Window<kPixels> window(args, pixel);
  const int64_t out = pixel * args.out_step + channel;
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  auto* y = static_cast<scalar_t*>(args.y);
  if (residual != nullptr)
    for (int p = 0; p < kPixels; ++p) prefetch<kVectors * kWide>(residual + out + p * args.out_step);
  if (!args.stream)
    for (int p = 0; p < kPixels; ++p) own<kVectors * kWide>(y + out + p * args.out_step);
  Sum sum[kPixels][kVectors] = {}, total[kPixels][kVectors];
  bool has_total = false;
  int64_t since = 0;  // words added up in sum
  for (int64_t ky = 0; ky < args.kernel_h; ++ky) {
    const bool outside = window.is_outside(args, ky * args.dilation_h);
    for (int64_t kx = 0; kx < args.kernel_w; ++kx) {
      const char* x[kPixels];
      for (int p = 0; p < kPixels; ++p) x[p] = window.tap(args, p, ky * args.dilation_h, kx * args.dilation_w);
      for (int64_t word = 0; word < args.run;) {
        const int64_t stop = min(args.run, word + kSumWords - since);
        since += stop - word;
        if (outside) weight += (stop - word) * kVectors * kWide;
        else if constexpr (kGroups) weight = add_own_words<scalar_t>(sum, x, word, stop, weight, args);
        else weight = add_words<scalar_t>(sum, x, word, stop, weight, coming);
        word = stop;
        if (since == kSumWords) {
          since = 0;
#pragma GCC unroll 8
          for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              total[p][v] = has_total ? total[p][v] + sum[p][v] : sum[p][v];
              sum[p][v] = Sum{};
            }
          has_total = true;
        }
      }
    }
  }
  if (has_total)
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[p][v] = total[p][v] + sum[p][v];
  const float* bias = args.bias + channel;
  if (last < kWide || args.stream) {
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = out + p * args.out_step + v * kWide;
        if (args.stream) finish(args, sum[p][v], bias + v * kWide, y, residual, at, Stream{});
        else if (v + 1 < kVectors) finish(args, sum[p][v], bias + v * kWide, y, residual, at, Whole{});
        else finish(args, sum[p][v], bias + v * kWide, y, residual, at, Part{last});
      }
  } else if (residual != nullptr) {
    finish_tile<true, scalar_t>(args, sum, bias, y + out, residual + out);
  } else {
    finish_tile<false, scalar_t>(args, sum, bias, y + out, residual);
  }
}

template <typename scalar_t, int... i>
void tiles(const ConvArgs& args, int64_t begin, int64_t end, std::integer_sequence<int, i...>) {
  static constexpr decltype(&tile<scalar_t, 1, 1>) table[] = {tile<scalar_t, i / kMostVectors + 1, i % kMostVectors + 1>...};
  static constexpr decltype(&tile<scalar_t, 1, 1>) own[] = {tile<scalar_t, i / kMostVectors + 1, 1, true>...};
  const auto* run = args.group == 0 ? table : own;
  for_tiles(args, begin, end, [&](int64_t shape, auto... place) { run[shape](args, place...); });
}

}  // namespace

void conv_bn_act_forward(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr TileShapes shapes{};
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) tiles<bf16>(args, begin, end, shapes);
  else tiles<float>(args, begin, end, shapes);
#else
  tiles<float>(args, begin, end, shapes);
#endif
  if (args.stream) stream_fence();
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
