// Formula: dg = G' [sum over tiles of (A dy A') * (B' d B)] G, the transpose of Winograd's F(2x2, 3x3) (Lavin 2016).
// Layout: channels last; for each point a matrix product of x's channels (vectors) by output channels over the tiles.
// Bytes per tile: 16 pixels of x and 4 of grad_y read, 16 points of each written and read; the sums once a group.
// Accumulate type: float, kRunTiles products at a time, those sums one after the other; the order of tiles is fixed.
// Invariants: the same bits for any number of threads; what is not finite is told, for the transform spreads it.
#include "cpu/conv.h"
#include "cpu/winograd_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kPoints = kWinogradPoints;
constexpr int64_t kRunTiles = 64;  // whose channels stay in L1 while all output channels are multiplied by them
constexpr int kRows = 4;           // output channels in registers, by kMostVectors vectors of x's channels

FASTRES_INLINE int64_t channel_blocks(const ConvArgs& conv) { return ceil_div(conv.run, kBlockChannels); }

// A dy A' of one tile: point i of the vector of output channels from k on goes to v + i * point_step + k.
FASTRES_INLINE void transform_gradient(const ConvGradArgs& args, const Tile& tile, float* v, int64_t point_step) {
  const ConvArgs& conv = args.forward.conv;
  const bool down = tile.row + 1 < conv.out_h, right = tile.col + 1 < conv.out_w;
  const float* from = args.grad_y + ((tile.image * conv.out_h + tile.row) * conv.out_w + tile.col) * conv.out_channels;
  const int64_t line = conv.out_w * conv.out_channels;
  const auto spread = [](Sum a, Sum b, Sum (&out)[4]) __attribute__((always_inline)) {  // a row of A
    out[0] = a;
    out[1] = a + b;
    out[2] = a - b;
    out[3] = Sum{} - b;
  };
  for (int64_t k = 0; k < conv.out_channels; k += kWide) {
    const auto at = [&](bool exists, int64_t offset) __attribute__((always_inline)) {
      return exists ? load<float, kWide>(from + offset + k, Whole{}) : Sum{};
    };
    Sum top[4], bottom[4], points[4];
    spread(at(true, 0), at(right, conv.out_channels), top);
    spread(at(down, line), at(down && right, line + conv.out_channels), bottom);
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      spread(top[x], bottom[x], points);
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) store<kWide>(v + (y * 4 + x) * point_step + k, points[y], Whole{});
    }
  }
}

// Sums of kRows output channels by kVectors vectors of x's channels, over `count` tiles.
template <int kVectors>
FASTRES_INLINE void multiply(const float* y, int64_t y_step, const float* x, int64_t count, bool is_first, float* sums) {
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
        sum[k][v] = multiply_add(float{}, reinterpret_cast<const char*>(y + k), w[v], sum[k][v]);
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
template <int kVectors>
void multiply_block(const ConvGradArgs& args, const float* y, const float* x, float* sums) {
  const int64_t channels = args.forward.conv.out_channels;
  for (int64_t t = 0; t < args.count; t += kRunTiles) {
    const int64_t count = min(kRunTiles, args.count - t);
    for (int64_t k = 0; k < channels; k += kRows)
      multiply<kVectors>(y + t * channels + k, channels, x + t * kVectors * kWide, count, args.first + t == 0,
                         sums + k * kVectors * kWide);
  }
}

FASTRES_INLINE void gather(const Sum (&u)[4], Sum (&out)[3]) {  // a row of G'
  const Sum ends = (u[1] + u[2]) * 0.5f;
  out[0] = u[0] + ends;
  out[1] = (u[1] - u[2]) * 0.5f;
  out[2] = ends + u[3];
}

}  // namespace

void conv_grad_transform(const ConvGradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.forward.conv;
  for (int64_t t = begin; t < end; ++t) {
    const Tile tile = tile_at(args.forward, args.first + t);
    transform_input(conv, tile, args.x_tiles, args.x_step, [&](int64_t c) {
      const int64_t block = c / kBlockChannels * kBlockChannels, width = min(kBlockChannels, conv.run - block);
      return block * args.count + t * width + c - block;
    });
    transform_gradient(args, tile, args.y_tiles + t * conv.out_channels, args.y_step);
  }
}

void conv_grad_multiply(const ConvGradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.forward.conv;
  const int64_t blocks = channel_blocks(conv);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t point = at / blocks, channel = at % blocks * kBlockChannels;
    const float* y = args.y_tiles + point * args.y_step;
    const float* x = args.x_tiles + point * args.x_step + channel * args.count;
    float* sums = args.points + (point * conv.run + channel) * conv.out_channels;
    switch (min(kBlockChannels, conv.run - channel) / kWide) {
      case 1: multiply_block<1>(args, y, x, sums); break;
      case 2: multiply_block<2>(args, y, x, sums); break;
#if FASTRES_CPU_LEVEL >= 4
      case 3: multiply_block<3>(args, y, x, sums); break;
      case 4: multiply_block<4>(args, y, x, sums); break;
#endif
    }
  }
}

void conv_grad_finish(const ConvGradArgs& args, int64_t begin, int64_t end) {
  const ConvArgs& conv = args.forward.conv;
  Sum nothing{};  // stays zero while all is finite
  for (int64_t k = begin; k < end; ++k)
    for (int64_t c = 0; c < conv.run; c += kWide) {
      const int64_t block = c / kBlockChannels * kBlockChannels, width = min(kBlockChannels, conv.run - block);
      const float* from = args.points + block * conv.out_channels + k * width + c - block;
      Sum rows[4][3], taps[3];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) {
        Sum u[4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) u[x] = load<float, kWide>(from + (y * 4 + x) * conv.run * conv.out_channels, Whole{});
        gather(u, rows[y]);
      }
#pragma GCC unroll 3
      for (int x = 0; x < 3; ++x) {
        const Sum column[4] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
        gather(column, taps);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          nothing += taps[y] - taps[y];
          store<kWide>(args.grad_weight + ((k * 3 + y) * 3 + x) * conv.run + c, taps[y], Whole{});
        }
      }
    }
  for (int64_t i = 0; i < kWide; ++i)
    if (nothing[i] != 0) args.finite->store(false, std::memory_order_relaxed);  // so does NaN: it is not 0
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
