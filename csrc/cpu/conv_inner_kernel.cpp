// Formula: y[pixel, k] = sum over the taps that reach the pixel and over channels of x[pixel', c] * w[k, tap, c].
// Layout: channels last. For each tap inner products of rows of weights with the pixels that the tap joins, both dense in
// channels, kOuterRows rows by kPixels pixels in registers.
// Bytes: the weights of taps that join pixels read once per kPixels pairs; x and y from the caches, since pixels are few.
// Accumulate type: float, one sum for each lane and tap, then those sums, in a fixed order. One rounding.
// Invariants: the same bits for any number of threads; padding is left out, not multiplied; a pixel that no tap reaches gets 0.
#include "cpu/conv.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int kPixels = FASTRES_CPU_LEVEL >= 4 ? 4 : 2;  // with so many sums, operands still fit into registers

template <int kLanes>
FASTRES_INLINE float across(Vec<float, kLanes> v) {
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    Vec<float, kLanes / 2> halves[2];
    memcpy(halves, &v, sizeof(v));
    return across<kLanes / 2>(halves[0] + halves[1]);
  }
}

// Adds a tap's products of kCount pixels of x with kOuterRows rows of weights to the sums of kWide output channels a pixel.
template <typename scalar_t, int kCount>
FASTRES_INLINE void add_products(const ConvInnerArgs& args, const scalar_t* weight, const PixelPair* pair, float* sums) {
  const auto* x = static_cast<const scalar_t*>(args.x);
  const int64_t step = args.taps * args.channels;
  Sum sum[kOuterRows][kCount] = {};
  for (int64_t channel = 0; channel < args.channels; channel += kWide) {
    Sum w[kOuterRows];
#pragma GCC unroll 8
    for (int row = 0; row < kOuterRows; ++row) w[row] = load<float, kWide>(weight + row * step + channel, Whole{});
#pragma GCC unroll 8
    for (int p = 0; p < kCount; ++p) {
      const Sum own = load<float, kWide>(x + pair[p].x + channel, Whole{});
#pragma GCC unroll 8
      for (int row = 0; row < kOuterRows; ++row) sum[row][p] = multiply_add(float{}, own, w[row], sum[row][p]);
    }
  }
  for (int p = 0; p < kCount; ++p)
    for (int row = 0; row < kOuterRows; ++row) sums[pair[p].y / args.out_channels * kWide + row] += across<kWide>(sum[row][p]);
}

// All pixels of kWide output channels from `first` on.
template <typename scalar_t>
void outputs(const ConvInnerArgs& args, int64_t first, float* sums) {
  memset(sums, 0, args.pixels * kWide * sizeof(float));
  for (int64_t row = 0; row < kWide; row += kOuterRows) {
    const auto* weight = static_cast<const scalar_t*>(args.weight) + (first + row) * args.taps * args.channels;
    for (int64_t tap = 0; tap < args.taps; ++tap, weight += args.channels) {
      const PixelPair *pair = args.pairs + args.first_pair[tap], *last = args.pairs + args.first_pair[tap + 1];
      for (; last - pair >= kPixels; pair += kPixels) add_products<scalar_t, kPixels>(args, weight, pair, sums + row);
      for (; pair < last; ++pair) add_products<scalar_t, 1>(args, weight, pair, sums + row);
    }
  }
  auto* y = static_cast<scalar_t*>(args.y) + first;
  for (int64_t p = 0; p < args.pixels; ++p) store<kWide>(y + p * args.out_channels, load<float, kWide>(sums + p * kWide, Whole{}), Whole{});
}

template <typename scalar_t>
void run(const ConvInnerArgs& args, int64_t begin, int64_t end) {
  const Lines sums(args.pixels * kWide * kWord);
  for (; begin < end; ++begin) outputs<scalar_t>(args, begin * kWide, reinterpret_cast<float*>(sums.get()));
}

}  // namespace

void conv_inner(const ConvInnerArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) return run<bf16>(args, begin, end);
#endif
  run<float>(args, begin, end);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
