// Formula: y = act(conv2d(x, weight) + bias [+ residual]), batch norm folded into weight and bias.
// Layout: channels last; a tile of pixels by channels stays in registers while all taps and input channels are added up.
// Bytes per output: x once per block of channels, mostly from L2, weights once per block of pixels, residual and y once.
// Accumulate type: float, in blocks, in the order of taps and channels; then bias and residual; one rounding, at the end.
// Invariants: an output's sum is the same in every tile and for any number of threads; padding is a run of zeros.
#include "cpu/conv_bn_act.h"

#include "cpu/conv_finish.h"
#include "cpu/conv_tile.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // totals are read where there are any
#endif

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

// One tile of kPixels by kVectors vectors, from `pixel` and `channel` on; `last` lanes of the last vector exist.
template <typename scalar_t, int kPixels, int kVectors>
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
  for_tiles(args, begin, end, [&](int64_t shape, auto... place) { table[shape](args, place...); });
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
