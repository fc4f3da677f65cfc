// Formula: y = sum of x * weight, times scale, plus bias [+ residual * residual_scale], rounded and saturated; groups = 1.
// Layout: channels last; a tile of pixels by channels stays in registers while all taps and input channels are added up.
// Bytes per output: x once per block of channels, mostly from L2, weights once per block of pixels, residual and y once.
// Accumulate type: int32, exact (the binding bounds the number of terms); scale and bias in float, one rounding at the end.
// Invariants: an output is the same in every tile and for any number of threads; padding is a run of zeros.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/conv_int8.h"

#include "cpu/conv_finish.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
namespace {

// One tile of kPixels by kVectors vectors, from `pixel` and `channel` on; `last` lanes of the last vector exist.
template <int kPixels, int kVectors>
FASTRES_DOT __attribute__((noinline)) void tile(const ConvInt8Args& args, const float* weight, Coming coming, int64_t pixel,
                                                int64_t channel, int64_t last) {
  const ConvArgs& conv = args.conv;
  const Window<kPixels> window(conv, pixel);
  const int64_t out = pixel * conv.out_channels + channel;
  const auto* residual = static_cast<const uint8_t*>(conv.residual);
  if (residual != nullptr)
    for (int p = 0; p < kPixels; ++p) prefetch<kVectors * kWide>(residual + out + p * conv.out_channels);
  if (!args.float_y)
    for (int p = 0; p < kPixels; ++p) own<kVectors * kWide>(static_cast<uint8_t*>(conv.y) + out + p * conv.out_channels);
  IntSum sum[kPixels][kVectors] = {};
  for (int64_t ky = 0; ky < conv.kernel_h; ++ky) {
    if (window.is_outside(conv, ky * conv.dilation_h)) {
      weight += conv.kernel_w * conv.run * kVectors * kWide;
      continue;
    }
    for (int64_t kx = 0; kx < conv.kernel_w; ++kx) {
      const char* x[kPixels];
      for (int p = 0; p < kPixels; ++p) x[p] = window.tap(conv, p, ky * conv.dilation_h, kx * conv.dilation_w);
      weight = add_words<uint8_t>(sum, x, 0, conv.run, weight, coming);
    }
  }
  const float *scale = args.scale + channel, *bias = conv.bias + channel;
  if constexpr (kVectors == 4) {
    if (last == kWide && !args.float_y) {
      auto* y = static_cast<uint8_t*>(conv.y);
#pragma GCC unroll 8
      for (int p = 0; p < kPixels; ++p) {
        const int64_t at = out + p * conv.out_channels;
        if (residual != nullptr) finish_packed<true>(args, sum[p], scale, bias, residual + at, y + at);
        else finish_packed<false>(args, sum[p], scale, bias, nullptr, y + at);
      }
      return;
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      finish(args, sum[p][v], scale + v * kWide, bias + v * kWide, out + p * conv.out_channels + v * kWide,
             v + 1 < kVectors ? 0xffff : static_cast<__mmask16>((1u << last) - 1));
}

template <int... i>
void tiles(const ConvInt8Args& args, int64_t begin, int64_t end, std::integer_sequence<int, i...>) {
  [[maybe_unused]] static constexpr decltype(&tile<1, 1>) table[] = {tile<i / kMostVectors + 1, i % kMostVectors + 1>...};
  for_tiles(args.conv, begin, end, [&](int64_t shape, auto... place) { table[shape](args, place...); });
}

}  // namespace

void conv_int8_forward(const ConvInt8Args& args, int64_t begin, int64_t end) { tiles(args, begin, end, TileShapes{}); }
#else
void conv_int8_forward(const ConvInt8Args&, int64_t, int64_t) {}  // no processor of this level has the instruction
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
