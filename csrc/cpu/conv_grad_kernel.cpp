// Formula: dg = G' [sum over tiles of (A dy A') * (B' d B)] G, the transpose of Winograd's F(2x2, 3x3) (Lavin 2016).
// Layout: channels last; for each point a matrix product of x's channels (vectors) by output channels over the tiles.
// Bytes per tile: 16 pixels of x and 4 of grad_y read, 16 points of each written and read; the sums once a group.
// Accumulate type: float: kRunWords words of tiles at a time, then those sums, then those of parts; the order of tiles is fixed.
// Invariants: the same bits for any number of threads; values that are not finite are reported, since the transform spreads them.
#include "cpu/conv.h"
#include "cpu/winograd_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kRunWords = 64;  // of tiles, whose channels stay in L1 while all output channels are multiplied by them
constexpr int kRows = 4;           // output channels in registers, by kMostVectors vectors of x's channels

template <typename scalar_t>
FASTRES_INLINE int64_t channels_of(const ConvArgs& conv) {
  return conv.run * kPerWord<scalar_t>;
}

// The outputs of one tile, null beyond the image, and their transform: A dy A' of a vector of output channels from k on.
template <typename scalar_t>
struct Gradients {
  const scalar_t* at[2][2];

  FASTRES_INLINE Gradients(const ConvGradArgs& args, const Tile& tile) {
    const ConvArgs& conv = args.forward.conv;
    const auto* grad_y = static_cast<const scalar_t*>(args.grad_y);
    for (int64_t y = 0; y < 2; ++y)
      for (int64_t x = 0; x < 2; ++x) {
        const int64_t row = tile.row + y, col = tile.col + x;
        at[y][x] = row < conv.out_h && col < conv.out_w
                       ? grad_y + ((tile.image * conv.out_h + row) * conv.out_w + col) * conv.out_channels
                       : nullptr;
      }
  }
};

FASTRES_INLINE void spread(Sum a, Sum b, Sum (&out)[4]) {  // a row of A
  out[0] = a;
  out[1] = a + b;
  out[2] = a - b;
  out[3] = Sum{} - b;
}

template <typename scalar_t>
FASTRES_INLINE void transform_gradients(const Gradients<scalar_t>& gradients, int64_t k, Sum (&points)[kPoints]) {
  Sum rows[2][4];
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    Sum d[2];
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) d[x] = gradients.at[y][x] ? load<float, kWide>(gradients.at[y][x] + k, Whole{}) : Sum{};
    spread(d[0], d[1], rows[y]);
  }
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    Sum out[4];
    spread(rows[0][x], rows[1][x], out);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) points[y * 4 + x] = out[y];
  }
}

// Transforms the words of tiles [begin, end): tiles past the group's last are zeros.
template <typename scalar_t>
FASTRES_DOT void transform(const ConvGradArgs& args, int64_t begin, int64_t end) {
  constexpr int64_t kTogether = kPerWord<scalar_t>;
  const ConvArgs& conv = args.forward.conv;
  const int64_t words = ceil_div(args.count, kTogether), channels = channels_of<scalar_t>(conv);
  for (int64_t t = begin; t < end; ++t) {
    const auto tile = [&](int64_t i) { return tile_at(args.forward, args.first + min(t * kTogether + i, args.count - 1)); };
    const Pixels<scalar_t> pixels[2] = {{conv, tile(0)}, {conv, tile(kTogether - 1)}};
    const Gradients<scalar_t> gradients[2] = {{args, tile(0)}, {args, tile(kTogether - 1)}};
    const bool full = (t + 1) * kTogether <= args.count;
    for (int64_t c = 0; c < channels; c += kWide) {
      Sum points[kTogether][kPoints] = {};
      transform_pixels(pixels[0], c, points[0]);
      if (kTogether == 2 && full) transform_pixels(pixels[1], c, points[kTogether - 1]);
      const int64_t block = c / kBlockChannels * kBlockChannels, width = min(kBlockChannels, channels - block);
      put_points<scalar_t>(args.x_tiles + block * words + t * width + c - block, args.x_step, points);
    }
    for (int64_t k = 0; k < conv.out_channels; k += kWide) {
      Sum points[kTogether][kPoints] = {};
      transform_gradients(gradients[0], k, points[0]);
      if (kTogether == 2 && full) transform_gradients(gradients[1], k, points[kTogether - 1]);
      put_points<scalar_t>(args.y_tiles + t * conv.out_channels + k, args.y_step, points);
    }
  }
}

// Sums of kRows output channels by kVectors vectors of x's channels, over `count` words of tiles.
template <typename scalar_t, int kVectors>
FASTRES_DOT FASTRES_INLINE void multiply(const float* y, int64_t y_step, const float* x, int64_t count, bool is_first,
                                              float* sums) {
  constexpr int64_t kWidth = kVectors * kWide;
  Sum sum[kRows][kVectors] = {};
  for (int64_t t = 0; t < count; ++t, y += y_step, x += kWidth) {
    Sum w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) w[v] = load<float, kWide>(x + v * kWide, Whole{});
#pragma GCC unroll 8
    for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[k][v] = multiply_add(scalar_t{}, everywhere(reinterpret_cast<const char*>(y + k)), w[v], sum[k][v]);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kRows; ++k)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = sums + k * kWidth + v * kWide;
      store<kWide>(to, is_first ? sum[k][v] : load<float, kWide>(to, Whole{}) + sum[k][v], Whole{});
    }
}

// One point and one block of x's channels of a group of tiles, for all output channels.
template <typename scalar_t, int kVectors>
FASTRES_DOT void multiply_block(const ConvGradArgs& args, const float* y, const float* x, float* sums) {
  const int64_t channels = args.forward.conv.out_channels, words = ceil_div(args.count, kPerWord<scalar_t>);
  for (int64_t t = 0; t < words; t += kRunWords) {
    const int64_t count = min(kRunWords, words - t);
    for (int64_t k = 0; k < channels; k += kRows)
      multiply<scalar_t, kVectors>(y + t * channels + k, channels, x + t * kVectors * kWide, count, args.first + t == args.start,
                                   sums + k * kVectors * kWide);
  }
}

template <typename scalar_t>
void multiply_blocks(const ConvGradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.forward.conv;
  const int64_t channels = channels_of<scalar_t>(conv), blocks = ceil_div(channels, kBlockChannels);
  const int64_t words = ceil_div(args.count, kPerWord<scalar_t>);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t point = at / blocks, channel = at % blocks * kBlockChannels;
    const float *y = args.y_tiles + point * args.y_step, *x = args.x_tiles + point * args.x_step + channel * words;
    float* sums = args.points + (point * channels + channel) * conv.out_channels;
    switch (min(kBlockChannels, channels - channel) / kWide) {
      case 1: multiply_block<scalar_t, 1>(args, y, x, sums); break;
      case 2: multiply_block<scalar_t, 2>(args, y, x, sums); break;
#if FASTRES_CPU_LEVEL >= 4
      case 3: multiply_block<scalar_t, 3>(args, y, x, sums); break;
      case 4: multiply_block<scalar_t, 4>(args, y, x, sums); break;
#endif
    }
  }
}

FASTRES_INLINE void gather(const Sum (&u)[4], Sum (&out)[3]) {  // a row of G'
  const Sum ends = (u[1] + u[2]) * 0.5f;
  out[0] = u[0] + ends;
  out[1] = (u[1] - u[2]) * 0.5f;
  out[2] = ends + u[3];
}

template <typename scalar_t>
void finish(const ConvGradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.forward.conv;
  const int64_t channels = channels_of<scalar_t>(conv), step = channels * conv.out_channels;
  Sum nothing{};  // stays zero while all is finite
  for (int64_t k = begin; k < end; ++k)
    for (int64_t c = 0; c < channels; c += kWide) {
      const int64_t block = c / kBlockChannels * kBlockChannels, width = min(kBlockChannels, channels - block);
      const float* from = args.points + block * conv.out_channels + k * width + c - block;
      Sum rows[4][3], taps[3];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        Sum u[4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
          const float* at = from + (y * 4 + x) * step;
          u[x] = load<float, kWide>(at, Whole{});
          for (int64_t part = 1; part < args.parts; ++part)
            u[x] += load<float, kWide>(at + part * kPoints * step, Whole{});
        }
        gather(u, rows[y]);
      }
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const Sum column[4] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
        gather(column, taps);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          nothing += taps[y] - taps[y];
          store<kWide>(static_cast<scalar_t*>(args.grad_weight) + ((k * 3 + y) * 3 + x) * channels + c, taps[y], Whole{});
        }
      }
    }
  if (!is_finite(nothing)) args.finite->store(false, std::memory_order_relaxed);
}

}  // namespace

#if FASTRES_CPU_LEVEL >= 4
#define FASTRES_BY_DTYPE(function)                                                                          \
  if (args.forward.conv.dtype == DType::kBFloat16) function<bf16>(args, begin, end);                        \
  else function<float>(args, begin, end)
#else
#define FASTRES_BY_DTYPE(function) function<float>(args, begin, end)
#endif

void conv_grad_transform(const ConvGradArgs& args, int64_t begin, int64_t end) { FASTRES_BY_DTYPE(transform); }
void conv_grad_multiply(const ConvGradArgs& args, int64_t begin, int64_t end) { FASTRES_BY_DTYPE(multiply_blocks); }
void conv_grad_finish(const ConvGradArgs& args, int64_t begin, int64_t end) { FASTRES_BY_DTYPE(finish); }

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
