// Formula: dw[k, tap, c] = sum over the pixels that the tap joins of dy[pixel, k] * x[pixel', c]; dx[pixel', c] = sum over taps
// and output channels of dy[pixel, k] * w[k, tap, c].
// Layout: channels last. For each tap a product of output channels by x's channels (vectors) over the pairs of pixels; or of
// pairs by x's channels over the output channels, with sums of all pixels of x for a block of channels in the caches.
// Bytes: the weights' gradient written once, or the weights of taps that join pixels read once per four pairs; x and dy from the
// caches, since pixels are few.
// Accumulate type: float, kTogether pairs or kChannels output channels at a time, then those sums, in a fixed order. One rounding.
// Invariants: the same bits for any number of threads; padding is left out, not multiplied; a tap that joins none gives 0.
#include "cpu/conv.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kTogether = 16;  // pairs that are added up before they join the total: so short a sum loses little
constexpr int64_t kChannels = 64;  // the same of output channels
constexpr int64_t kPairs = 4;      // of pixels in registers

FASTRES_INLINE float number(float v) { return v; }
FASTRES_INLINE float number(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

// Adds the products of kCount values by kVectors vectors from `vectors` on.
template <typename scalar_t, int kCount, int kVectors, typename Value>
FASTRES_INLINE void add_product(Value value, const scalar_t* vectors, Sum (&sum)[kCount][kVectors]) {
  Sum w[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) w[v] = load<float, kWide>(vectors + v * kWide, Whole{});
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const float own = number(value(i));
    const Sum every = everywhere(reinterpret_cast<const char*>(&own));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(float{}, every, w[v], sum[i][v]);
  }
}

// kOuterRows output channels from dy on, by kVectors vectors of channels from x on, over the pairs of a tap.
template <typename scalar_t, int kVectors>
FASTRES_INLINE void add_up(const PixelPair* pair, const PixelPair* end, const scalar_t* dy, const scalar_t* x,
                           Sum (&total)[kOuterRows][kVectors]) {
  while (pair < end) {
    const PixelPair* stop = end - pair > kTogether ? pair + kTogether : end;
    Sum sum[kOuterRows][kVectors] = {};
    for (; pair < stop; ++pair) add_product([&](int k) { return dy[pair->y + k]; }, x + pair->x, sum);
#pragma GCC unroll 8
    for (int k = 0; k < kOuterRows; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[k][v] += sum[k][v];
  }
}

// A tap's gradients of a block of channels, for the output channels [begin, end).
template <typename scalar_t, int kVectors>
void block(const ConvOuterArgs& args, int64_t tap, int64_t channel, int64_t begin, int64_t end) {
  const PixelPair *first = args.pairs + args.first_pair[tap], *last = args.pairs + args.first_pair[tap + 1];
  const auto *dy = static_cast<const scalar_t*>(args.grad_y), *x = static_cast<const scalar_t*>(args.x) + channel;
  for (int64_t k = begin; k < end; k += kOuterRows) {
    Sum total[kOuterRows][kVectors] = {};
    add_up<scalar_t, kVectors>(first, last, dy + k, x, total);
    auto* to = static_cast<scalar_t*>(args.grad) + (k * args.taps + tap) * args.channels + channel;
    for (int row = 0; row < kOuterRows; ++row, to += args.taps * args.channels)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store<kWide>(to + v * kWide, total[row][v], Whole{});
  }
}

template <typename scalar_t>
void blocks(const ConvOuterArgs& args, int64_t begin, int64_t end) {
  for (int64_t tap = 0; tap < args.taps; ++tap)
    for (int64_t channel = 0; channel < args.channels; channel += kBlockChannels)
      switch (min(kBlockChannels, args.channels - channel) / kWide) {
        case 1: block<scalar_t, 1>(args, tap, channel, begin, end); break;
        case 2: block<scalar_t, 2>(args, tap, channel, begin, end); break;
#if FASTRES_CPU_LEVEL >= 4
        case 3: block<scalar_t, 3>(args, tap, channel, begin, end); break;
        case 4: block<scalar_t, 4>(args, tap, channel, begin, end); break;
#endif
        default: break;
      }
}

// ---- the gradient of x ------------------------------------------------------------------------------

// Adds a tap's products of kCount pixels of dy, a row of output channels each, to as many sums.
template <typename scalar_t, int kVectors, int kCount>
FASTRES_INLINE void add_products(const ConvOuterArgs& args, const scalar_t* weight, const PixelPair* pair, float* sums) {
  constexpr int64_t kWidth = kVectors * kWide;
  const auto* dy = static_cast<const scalar_t*>(args.grad_y);
  const int64_t step = args.taps * args.channels;
  for (int64_t begin = 0; begin < args.out_channels; begin += kChannels) {
    const int64_t end = min(begin + kChannels, args.out_channels);
    Sum sum[kCount][kVectors] = {};
    for (int64_t k = begin; k < end; ++k, weight += step)
      add_product([&](int p) { return dy[pair[p].y + k]; }, weight, sum);
#pragma GCC unroll 8
    for (int p = 0; p < kCount; ++p)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = sums + pair[p].x / args.channels * kWidth + v * kWide;
        store<kWide>(to, load<float, kWide>(to, Whole{}) + sum[p][v], Whole{});
      }
  }
}

// A block of channels of all pixels; `sums` holds kBlockChannels for each.
template <typename scalar_t, int kVectors>
void input_block(const ConvOuterArgs& args, int64_t channel, float* sums) {
  constexpr int64_t kWidth = kVectors * kWide;
  const int64_t pixels = args.x_values / args.channels;
  memset(sums, 0, pixels * kWidth * sizeof(float));
  const auto* weight = static_cast<const scalar_t*>(args.x) + channel;
  for (int64_t tap = 0; tap < args.taps; ++tap, weight += args.channels) {
    const PixelPair *pair = args.pairs + args.first_pair[tap], *last = args.pairs + args.first_pair[tap + 1];
    for (; last - pair >= kPairs; pair += kPairs) add_products<scalar_t, kVectors, kPairs>(args, weight, pair, sums);
    for (; pair < last; ++pair) add_products<scalar_t, kVectors, 1>(args, weight, pair, sums);
  }
  auto* to = static_cast<scalar_t*>(args.grad) + channel;
  for (int64_t p = 0; p < pixels; ++p, to += args.channels)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<kWide>(to + v * kWide, load<float, kWide>(sums + p * kWidth + v * kWide, Whole{}), Whole{});
}

template <typename scalar_t>
void input_blocks(const ConvOuterArgs& args, int64_t begin, int64_t end) {
  const Lines sums(args.x_values / args.channels * kBlockChannels * kWord);
  auto* at = reinterpret_cast<float*>(sums.get());
  for (int64_t channel = begin; channel < end; channel += kBlockChannels)
    switch (min(kBlockChannels, end - channel) / kWide) {
      case 1: input_block<scalar_t, 1>(args, channel, at); break;
      case 2: input_block<scalar_t, 2>(args, channel, at); break;
#if FASTRES_CPU_LEVEL >= 4
      case 3: input_block<scalar_t, 3>(args, channel, at); break;
      case 4: input_block<scalar_t, 4>(args, channel, at); break;
#endif
      default: break;
    }
}

}  // namespace

void conv_outer_input(const ConvOuterArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) return input_blocks<bf16>(args, begin * kWide, end * kWide);
#endif
  input_blocks<float>(args, begin * kWide, end * kWide);
}

void conv_outer_weight(const ConvOuterArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) return blocks<bf16>(args, begin * kOuterRows, end * kOuterRows);
#endif
  blocks<float>(args, begin * kOuterRows, end * kOuterRows);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
