// Formula: G g G' of every 3x3 kernel g (Lavin 2016): 16 points for 9 taps.
// Layout: from any strides, also turned about, to a vector of output channels for each block, point and input channel.
// Bytes per weight: one element read, 16/9 written.
// Accumulate type: float; the halves are exact, each point rounds at most three times, then to the weights' dtype.
// Invariants: lanes past the last output channel are zero.
#include "cpu/conv.h"
#include "cpu/winograd_tile.h"
#include "cpu/words.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

FASTRES_INLINE void transform(const Sum (&g)[3], Sum (&out)[4]) {  // a row of G
  const Sum ends = (g[0] + g[2]) * 0.5f, middle = g[1] * 0.5f;
  out[0] = g[0];
  out[1] = ends + middle;
  out[2] = ends - middle;
  out[3] = g[2];
}

FASTRES_INLINE float value_of(float v) { return v; }
FASTRES_INLINE float value_of(bf16 v) { return bits_as<float>(static_cast<uint32_t>(v.bits) << 16); }

// One tap of kWide output channels, of which `found` exist, and kWide channels from `from` on: a vector for each channel.
template <typename scalar_t>
FASTRES_INLINE void gather(const ConvWeightArgs& args, const scalar_t* from, int64_t found, float* to) {
  if (args.out_step == 1 && found == kWide) {
    for (int64_t c = 0; c < kWide; ++c) put(to + c * kWide, load<float, kWide>(from + c * args.channel_step, Whole{}));
  } else if (args.channel_step == 1 && found == kWide) {
    Sum rows[kWide];
#pragma GCC unroll 16
    for (int64_t k = 0; k < kWide; ++k) rows[k] = load<float, kWide>(from + k * args.out_step, Whole{});
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t c = 0; c < kWide; ++c) put(to + c * kWide, rows[c]);
  } else {
    for (int64_t c = 0; c < kWide; ++c)
      for (int64_t k = 0; k < kWide; ++k)
        to[c * kWide + k] = k < found ? value_of(from[k * args.out_step + c * args.channel_step]) : 0.0f;
  }
}

FASTRES_INLINE void transform_taps(const float (&taps)[9][kWide * kWide], int64_t c, Sum (&points)[kPoints]) {
  Sum rows[3][4];
#pragma GCC unroll 3
  for (int y = 0; y < 3; ++y) {
    Sum g[3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) g[x] = load<float, kWide>(taps[y * 3 + x] + c * kWide, Whole{});
    transform(g, rows[y]);
  }
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const Sum column[3] = {rows[0][x], rows[1][x], rows[2][x]};
    Sum out[4];
    transform(column, out);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) points[y * 4 + x] = out[y];
  }
}

template <typename scalar_t>
FASTRES_DOT void transform_weight(const ConvWeightArgs& args, int64_t begin, int64_t end) {
  const int64_t vectors = conv_weight_vectors(args), words = args.channels / kPerWord<scalar_t>;
  Sum nothing{};  // stays zero while all is finite
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at / vectors * kBlockChannels, channel = at % vectors * kWide;
    const int64_t found = min(kBlockChannels, args.out_channels - first), width = ceil_div(found, kWide) * kWide;
    for (int64_t lane = 0; lane < width; lane += kWide) {
      alignas(kVectorBytes) float taps[9][kWide * kWide];
      const auto* from = static_cast<const scalar_t*>(args.weight) + (first + lane) * args.out_step + channel * args.channel_step;
      for (int64_t tap = 0; tap < 9; ++tap)
        gather(args, from + tap / 3 * args.row_step + tap % 3 * args.col_step, min(kWide, found - lane), taps[tap]);
      float* to = args.packed + first * kPoints * words + channel / kPerWord<scalar_t> * width + lane;
      for (int64_t c = 0; c < kWide; c += kPerWord<scalar_t>, to += width) {
        Sum points[kPerWord<scalar_t>][kPoints];
#pragma GCC unroll 2
        for (int64_t i = 0; i < kPerWord<scalar_t>; ++i) {
          transform_taps(taps, c + i, points[i]);
#pragma GCC unroll 16
          for (const Sum& point : points[i]) nothing += point - point;
        }
        put_points<scalar_t>(to, words * width, points);
      }
    }
  }
  if (!is_finite(nothing)) args.finite->store(false, std::memory_order_relaxed);
}

}  // namespace

void conv_transform_weight(const ConvWeightArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.dtype == DType::kBFloat16) return transform_weight<bf16>(args, begin, end);
#endif
  transform_weight<float>(args, begin, end);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
