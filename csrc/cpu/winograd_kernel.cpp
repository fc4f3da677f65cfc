// Formula: y = act(conv2d(x, weight) + bias [+ residual]) for 3x3, stride 1, as A'[(G g G') * (B' d B)]A (Lavin 2016).
// Layout: channels last; a thread takes groups of 2x2 output tiles by a block of channels, its scratch stays in L2.
// Bytes per output: x once a group and block, transformed weights (16 for 9) once a group, residual and y once.
// Accumulate type: float, in blocks, as the direct kernel; a tile with a value that is not finite is computed directly.
// Invariants: an output's sum does not depend on group, thread or batch; padding is zeros before the transform.
#include "cpu/winograd.h"

#include <utility>

#include "common/epilogue.h"
#include "cpu/winograd_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

// One point of kTiles tiles: m = v times the weights of that point, for kVectors vectors of channels.
template <typename scalar_t, int kTiles, int kVectors>
FASTRES_DOT __attribute__((noinline)) void multiply(const float* v, int64_t words, const float* weight, Coming coming, float* m) {
  const char* x[kTiles];
  for (int t = 0; t < kTiles; ++t) x[t] = reinterpret_cast<const char*>(v + t * words);
  for (int64_t word = 0; word < words; word += kSumWords) {
    Sum sum[kTiles][kVectors] = {};
    weight = add_words_of<scalar_t, 0, kTiles - 1>(sum, x, word, min(word + kSumWords, words), weight, coming);
#pragma GCC unroll 8
    for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        float* to = m + t * kBlockChannels + i * kWide;
        store<kWide>(to, word == 0 ? sum[t][i] : load<float, kWide>(to, Whole{}) + sum[t][i], Whole{});
      }
  }
}

using Multiply = void (*)(const float*, int64_t, const float*, Coming, float*);

template <typename scalar_t, int... i>
Multiply multiply_for(int64_t tiles, int64_t vectors, std::integer_sequence<int, i...>) {
  static constexpr Multiply table[] = {multiply<scalar_t, i / kMostVectors + 1, i % kMostVectors + 1>...};
  return table[(tiles - 1) * kMostVectors + vectors - 1];
}

// The 2x2 outputs of one tile, by the definition: for sums in which something is not finite, where the transform would
// spread it to its neighbours. The weights are those of the transform, taken back.
void convolve_directly(const ConvArgs& conv, const Tile& tile, const float* weight, int64_t width, int64_t lane, Sum (&out)[4]) {
  for (int o = 0; o < 4; ++o) out[o] = Sum{};
  const int64_t point_step = conv.run * width;
  for (int64_t c = 0; c < conv.run; ++c) {
    Sum rows[4][3], g[3][3];
    for (int y = 0; y < 4; ++y) {
      const float* u = weight + 4 * point_step * y + c * width + lane;
      rows[y][0] = load<float, kWide>(u, Whole{});
      rows[y][1] = load<float, kWide>(u + point_step, Whole{}) - load<float, kWide>(u + 2 * point_step, Whole{});
      rows[y][2] = load<float, kWide>(u + 3 * point_step, Whole{});
    }
    for (int x = 0; x < 3; ++x) g[0][x] = rows[0][x], g[1][x] = rows[1][x] - rows[2][x], g[2][x] = rows[3][x];
    for (int o = 0; o < 4; ++o)
      for (int y = 0; y < 3; ++y)
        for (int x = 0; x < 3; ++x) {
          const float* pixel = pixel_at<float>(conv, tile, o / 2 + y, o % 2 + x);
          if (pixel) out[o] = multiply_add(float{}, everywhere(reinterpret_cast<const char*>(pixel + c)), g[y][x], out[o]);
        }
  }
}

// A' m A of one tile and one vector of channels.
FASTRES_INLINE void transform_output(const float* m, int64_t point_step, Sum (&out)[4]) {
  Sum low[4], high[4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const auto at = [&](int y) __attribute__((always_inline)) { return load<float, kWide>(m + (y * 4 + x) * point_step, Whole{}); };
    const Sum m1 = at(1), m2 = at(2);
    low[x] = at(0) + m1 + m2;
    high[x] = m1 - m2 - at(3);
  }
  out[0] = low[0] + low[1] + low[2];
  out[1] = low[1] - low[2] - low[3];
  out[2] = high[0] + high[1] + high[2];
  out[3] = high[1] - high[2] - high[3];
}

// Bias, residual, activation and store of a tile's outputs that exist.
template <typename scalar_t, typename Lanes>
FASTRES_INLINE void finish(const ConvArgs& conv, const Tile& tile, int64_t channel, const Sum (&out)[4], Lanes lanes) {
  const Sum bias = load<float, kWide>(conv.bias + channel, lanes);
#pragma GCC unroll 4
  for (int o = 0; o < 4; ++o) {
    const int64_t row = tile.row + o / 2, col = tile.col + o % 2;
    if (row >= conv.out_h || col >= conv.out_w) continue;
    const int64_t at = ((tile.image * conv.out_h + row) * conv.out_w + col) * conv.out_channels + channel;
    Sum value = out[o] + bias;
    if (conv.residual != nullptr) value += load<float, kWide>(static_cast<const scalar_t*>(conv.residual) + at, lanes);
    store<kWide>(static_cast<scalar_t*>(conv.y) + at, conv.act == Act::kRelu ? relu(value) : value, lanes);
  }
}

// All points of a group of tiles times one block of channels, then its outputs.
template <typename scalar_t>
void block_of_channels(const WinogradArgs& args, int64_t first, int64_t count, int64_t block, const float* v, float* m) {
  const ConvArgs& conv = args.conv;
  constexpr auto shapes = std::make_integer_sequence<int, kMostPixels * kMostVectors>{};
  const int64_t channel = block * kBlockChannels, channels = min(kBlockChannels, conv.out_channels - channel);
  const int64_t vectors = ceil_div(channels, kWide), width = vectors * kWide;
  const auto* weight = static_cast<const float*>(conv.weight) + channel * kPoints * conv.run;
  const int64_t parts = ceil_div(count, kMostPixels);
  const int64_t v_step = point_step(count * conv.run), m_step = point_step(count * kBlockChannels);
  for (int point = 0; point < kPoints; ++point)
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      const float* own = weight + point * conv.run * width;
      const Coming coming = coming_after(own, conv.run, vectors, part, parts);
      multiply_for<scalar_t>(end - begin, vectors, shapes)(v + point * v_step + begin * conv.run, conv.run, own, coming,
                                                           m + point * m_step + begin * kBlockChannels);
    }
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tile_at(args, first + t);
    for (int64_t lane = 0; lane < channels; lane += kWide) {
      Sum out[4];
      transform_output(m + t * kBlockChannels + lane, m_step, out);
      const Sum all = (out[0] - out[0]) + (out[1] - out[1]) + (out[2] - out[2]) + (out[3] - out[3]);
      if (!is_finite(all)) [[unlikely]] {
        if (args.finite != nullptr) args.finite->store(false, std::memory_order_relaxed);
        else convolve_directly(conv, tile, weight, width, lane, out);
      }
      if (channels - lane >= kWide) finish<scalar_t>(conv, tile, channel + lane, out, Whole{});
      else finish<scalar_t>(conv, tile, channel + lane, out, Part{channels - lane});
    }
  }
}

template <typename scalar_t>
FASTRES_DOT void transform_tile(const ConvArgs& conv, const Tile& tile, float* v, int64_t point_step) {
  const Pixels<scalar_t> pixels(conv, tile);
  for (int64_t c = 0; c < conv.run * kPerWord<scalar_t>; c += kWide) {
    Sum points[kPoints];
    transform_pixels(pixels, c, points);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kPoints; ++i) put(reinterpret_cast<scalar_t*>(v + i * point_step) + c, points[i]);
  }
}

template <typename scalar_t>
void forward(const WinogradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.conv;
  const int64_t tiles = conv.images * args.tiles_h * args.tiles_w, blocks = ceil_div(conv.out_channels, kBlockChannels);
  const int64_t most = ceil_div(tiles, args.groups), v_words = kPoints * point_step(most * conv.run);
  const auto words = v_words + kPoints * point_step(most * kBlockChannels);
  const Lines scratch(words * kWord);
  float *v = reinterpret_cast<float*>(scratch.get()), *m = v + v_words;
  for (int64_t at = begin, now = -1; at < end; ++at) {
    const int64_t group = at / blocks, first = tiles * group / args.groups, count = tiles * (group + 1) / args.groups - first;
    if (group != now)
      for (int64_t t = 0; t < count; ++t)
        transform_tile<scalar_t>(conv, tile_at(args, first + t), v + t * conv.run, point_step(count * conv.run));
    now = group;
    block_of_channels<scalar_t>(args, first, count, at % blocks, v, m);
  }
}

}  // namespace

void winograd_forward(const WinogradArgs& args, int64_t begin, int64_t end) {
#if FASTRES_CPU_LEVEL >= 4
  if (args.conv.dtype == DType::kBFloat16) return forward<bf16>(args, begin, end);
#endif
  forward<float>(args, begin, end);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
