// Formula: dw[k, tap, c] = sum over the pixels that the tap joins of dy[pixel, k] * x[pixel', c].
// Layout: channels last; for each tap a matrix product of output channels by x's channels (vectors) over the pairs of pixels.
// Bytes: the gradient written once; x and dy read once per block of output channels, from the caches, since pixels are few.
// Accumulate type: float, kTogether pairs at a time, then those sums; the order of pixels is fixed. One rounding, at the end.
// Invariants: the same bits for any number of threads; padding is left out, not multiplied; a tap that joins none gives 0.
#include "cpu/conv.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kTogether = 16;  // pairs that are added up before they join the total: so short a sum loses little

FASTRES_INLINE float number(float v) { return v; }
FASTRES_INLINE float number(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

// kOuterRows output channels from dy on, by kVectors vectors of channels from x on, over the pairs of a tap.
template <typename scalar_t, int kVectors>
FASTRES_INLINE void add_up(const PixelPair* pair, const PixelPair* end, const scalar_t* dy, const scalar_t* x,
                           Sum (&total)[kOuterRows][kVectors]) {
  while (pair < end) {
    const PixelPair* stop = end - pair > kTogether ? pair + kTogether : end;
    Sum sum[kOuterRows][kVectors] = {};
    for (; pair < stop; ++pair) {
      Sum w[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) w[v] = load<float, kWide>(x + pair->x + v * kWide, Whole{});
#pragma GCC unroll 8
      for (int k = 0; k < kOuterRows; ++k) {
        const float value = number(dy[pair->grad_y + k]);
        const Sum every = everywhere(reinterpret_cast<const char*>(&value));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[k][v] = multiply_add(float{}, every, w[v], sum[k][v]);
      }
    }
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
    auto* to = static_cast<scalar_t*>(args.grad_weight) + (k * args.taps + tap) * args.channels + channel;
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
      }
}

}  // namespace

void conv_outer(const ConvOuterArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) return blocks<bf16>(args, begin * kOuterRows, end * kOuterRows);
#endif
  blocks<float>(args, begin * kOuterRows, end * kOuterRows);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
