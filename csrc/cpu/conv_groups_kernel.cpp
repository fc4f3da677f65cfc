// Formula: that of conv_bn_act, in groups of at most as many channels as a vector has lanes; depthwise is a group of one.
// Layout: channels last; where the taps of a tile of pixels begin is found once for many channels, which follow a vector at a time.
// Bytes per output: x once, and once more per tap from the nearest cache; weights once per tile of pixels; residual and y once.
// Accumulate type: float, in the order of taps and channels; then bias and residual; one rounding, at the end.
// Invariants: an output's sum is the same in every tile and for any number of threads; padding is a run of zeros.
#include "cpu/conv_bn_act.h"

#include "cpu/conv_finish.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

// Of a vector of output channels: each is a group and a word of its own; it holds several groups; or one group fills it.
enum class Share { kDepthwise, kSeveral, kWhole };

// The words of a vector of channels, or of its part that there is.
template <typename scalar_t, typename Lanes>
FASTRES_INLINE Sum words_at(const char* x, Lanes lanes) {
  using word_t = std::conditional_t<sizeof(scalar_t) == 2, uint16_t, float>;
  const auto words = move_in<Vec<word_t, kWide>>(reinterpret_cast<const word_t*>(x), lanes);
  return words_of<sizeof(words)>(reinterpret_cast<const char*>(&words));
}

// The products of one tap. Each lane adds the words of its group: its own word; those from lane first[lane] of the pixel's words
// on; or all the same ones.
template <typename scalar_t, Share kShare, int kPixels, typename Lanes>
FASTRES_DOT FASTRES_INLINE void add_tap(Sum (&sum)[kPixels], const char* const* x, int64_t offset, const float* weight, int64_t run,
                                        IntSum first, Lanes lanes) {
  Sum words[kPixels];
  if constexpr (kShare != Share::kWhole)
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) words[p] = words_at<scalar_t>(x[p] + offset, lanes);
  for (int64_t word = 0; word < run; ++word, weight += kWide) {
    const Sum w = load<float, kWide>(weight, Whole{});
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      Sum own;
      if constexpr (kShare == Share::kDepthwise) own = words[p];
      else if constexpr (kShare == Share::kSeveral) own = permuted(words[p], first + static_cast<int32_t>(word));
      else own = everywhere(x[p] + offset + word * kWord);
      sum[p] = multiply_add(scalar_t{}, own, w, sum[p]);
    }
  }
}

// kPixels pixels from `pixel` on, a part of the channels; `taps` has room for where each tap of each pixel begins.
template <typename scalar_t, Share kShare, int kPixels>
FASTRES_DOT __attribute__((noinline)) void tile(const ConvArgs& args, int64_t pixel, int64_t channel, IntSum first, const char** taps) {
  const Window<kPixels> window(args, pixel);
  const char** end = taps;
  for (int64_t down = 0; down < args.kernel_h; ++down)
    for (int64_t right = 0; right < args.kernel_w; ++right)
      for (int p = 0; p < kPixels; ++p) *end++ = window.tap(args, p, down * args.dilation_h, right * args.dilation_w);
  const int64_t last = min(channel + kGroupsChannels, args.out_channels);
  const auto* weight = static_cast<const float*>(args.weight) + channel * conv_depth(args);
  const auto* residual = static_cast<const scalar_t*>(args.residual);
  auto* y = static_cast<scalar_t*>(args.y);
  const auto vector = [&](auto lanes) FASTRES_DOT {
    Sum sum[kPixels] = {};
    const int64_t offset = channel * static_cast<int64_t>(sizeof(scalar_t));
    for (const char** x = taps; x < end; x += kPixels, weight += args.run * kWide)
      add_tap<scalar_t, kShare>(sum, x, offset, weight, args.run, first, lanes);
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      const int64_t at = (pixel + p) * args.out_step + channel;
      if (kIsWhole<decltype(lanes)> && args.stream) finish(args, sum[p], args.bias + channel, y, residual, at, Stream{});
      else finish(args, sum[p], args.bias + channel, y, residual, at, lanes);
    }
  };
  for (; channel + kWide <= last; channel += kWide) vector(Whole{});
  if constexpr (kShare != Share::kWhole)
    if (channel < last) vector(Part{last - channel});
}

template <typename scalar_t, Share kShare, int... i>
void tiles(const ConvArgs& args, int64_t begin, int64_t end, std::integer_sequence<int, i...>) {
  static constexpr decltype(&tile<scalar_t, kShare, 1>) table[] = {tile<scalar_t, kShare, i + 1>...};
  IntSum first;
  for (int lane = 0; lane < kWide; ++lane) first[lane] = static_cast<int32_t>(lane / args.group * args.run);
  const Lines taps(args.kernel_h * args.kernel_w * kMostPixels * static_cast<int64_t>(sizeof(char*)));
  const int64_t pixels = args.images * args.out_h * args.out_w, parts = ceil_div(args.out_channels, kGroupsChannels);
  for (; begin < end; ++begin) {
    const int64_t pixel = begin / parts * kMostPixels, channel = begin % parts * kGroupsChannels;
    table[min(kMostPixels, pixels - pixel) - 1](args, pixel, channel, first, reinterpret_cast<const char**>(taps.get()));
  }
}

}  // namespace

void conv_groups_forward(const ConvArgs& args, int64_t begin, int64_t end) {
  constexpr std::make_integer_sequence<int, kMostPixels> counts{};
  const bool whole = args.group == kWide;
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) {
    if (whole) tiles<bf16, Share::kWhole>(args, begin, end, counts);
    else tiles<bf16, Share::kSeveral>(args, begin, end, counts);
  } else  // of which a word is one value
#endif
  if (whole) tiles<float, Share::kWhole>(args, begin, end, counts);
  else if (args.group == 1) tiles<float, Share::kDepthwise>(args, begin, end, counts);
  else tiles<float, Share::kSeveral>(args, begin, end, counts);
  if (args.stream) stream_fence();
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
