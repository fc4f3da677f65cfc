// Formula: y = act(conv2d(x, weight) + bias [+ residual]), batch norm folded into weight and bias; groups = 1.
// Layout: channels last; a tile of pixels by channels stays in registers while all taps and input channels are added up.
// Bytes per output: x once per block of channels, mostly from L2, weights once per block of pixels, residual and y once.
// Accumulate type: float, in blocks, in the order of taps and channels; then bias and residual; one rounding, at the end.
// Invariants: an output's sum is the same in every tile and for any number of threads; padding is a run of zeros.
#include "cpu/conv_bn_act.h"

#include <utility>

#include "common/epilogue.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

alignas(64) constexpr char kZeros[kConvMostRun * kWord] = {};

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

// One tile of kPixels by kVectors vectors, from `pixel` and `channel` on; `last` lanes of the last vector exist.
template <typename scalar_t, int kPixels, int kVectors>
FASTRES_BF16_DOT __attribute__((noinline)) void tile(const ConvArgs& args, const float* weight, int64_t pixel,
                                                     int64_t channel, int64_t last) {
  const Window<kPixels> window(args, pixel);
  const int64_t out = pixel * args.out_channels + channel;
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  if (residual != nullptr)
    for (int p = 0; p < kPixels; ++p)
      for (int64_t line = 0; line < kVectors * kWide; line += 64 / static_cast<int64_t>(sizeof(scalar_t)))
        __builtin_prefetch(residual + out + p * args.out_channels + line);
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
        else weight = add_words<scalar_t, kPixels, kVectors>(sum, x, word, stop, weight);
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
  auto* y = static_cast<scalar_t*>(args.y);
  const auto finish = [&](int p, int v, auto lanes) __attribute__((always_inline)) {
    const int64_t at = out + p * args.out_channels + v * kWide;
    Sum value = (has_total ? total[p][v] + sum[p][v] : sum[p][v]) + load<float, kWide>(args.bias + channel + v * kWide, lanes);
    if (residual != nullptr) value += load<float, kWide>(residual + at, lanes);
    if (args.act == Act::kRelu) value = relu(value);
    store<kWide>(y + at, value, lanes);
  };
#pragma GCC unroll 8
  for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      if (args.stream) finish(p, v, Stream{});
      else if (v + 1 < kVectors || last == kWide) finish(p, v, Whole{});
      else finish(p, v, Part{last});
}

using Tile = void (*)(const ConvArgs&, const float*, int64_t, int64_t, int64_t);

template <typename scalar_t, int... i>
void tiles(const ConvArgs& args, int64_t begin, int64_t end, std::integer_sequence<int, i...>) {
  static constexpr Tile table[] = {tile<scalar_t, i / kMostVectors + 1, i % kMostVectors + 1>...};
  const int64_t pixels = args.images * args.out_h * args.out_w, blocks = ceil_div(args.out_channels, kBlockChannels);
  const int64_t depth = args.kernel_h * args.kernel_w * args.run;
  for (int64_t at = begin; at < end;) {  // tiles of a block of pixels, for one block of channels after the other
    const int64_t first = at / (args.block * blocks) * args.block;
    const int64_t count = min(args.block, ceil_div(pixels, kMostPixels) - first);
    const int64_t place = at - first * blocks, block = place / count;
    const int64_t channel = block * kBlockChannels, channels = min(kBlockChannels, args.out_channels - channel);
    const int64_t vectors = ceil_div(channels, kWide);
    const auto* weight = static_cast<const float*>(args.weight) + channel * depth;
    const int64_t stop = min(end, at - place % count + count);
    for (int64_t t = first + place % count; at < stop; ++at, ++t) {
      const int64_t pixel = t * kMostPixels, found = min(kMostPixels, pixels - pixel);
      table[(found - 1) * kMostVectors + vectors - 1](args, weight, pixel, channel, channels - (vectors - 1) * kWide);
    }
  }
}

}  // namespace

void conv_bn_act_forward(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr auto shapes = std::make_integer_sequence<int, kMostPixels * kMostVectors>{};
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
