// What the kernels of Winograd's F(2x2, 3x3) share: 2x2 output tiles, the 4x4 pixels of x under them and their transform.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/conv_tile.h"
#include "cpu/winograd.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

struct Tile {
  int64_t image, row, col;  // of its first output
};

FASTRES_INLINE Tile tile_at(const WinogradArgs& args, int64_t index) {
  const int64_t line = index / args.tiles_w;
  return {line / args.tiles_h, line % args.tiles_h * 2, index % args.tiles_w * 2};
}

FASTRES_INLINE const float* pixel_at(const ConvArgs& conv, const Tile& tile, int64_t y, int64_t x) {
  const int64_t row = tile.row + y - conv.pad_h, col = tile.col + x - conv.pad_w;
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(conv.height) ||
      static_cast<uint64_t>(col) >= static_cast<uint64_t>(conv.width))
    return nullptr;
  return reinterpret_cast<const float*>(static_cast<const char*>(conv.x) + tile.image * conv.image_step +
                                        row * conv.row_step + col * conv.pixel_step);
}

FASTRES_INLINE void transform_row(const Sum (&d)[4], Sum (&out)[4]) {  // a row of B'
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// B' d B of one tile: point i of the vector of channels from c on goes to v + i * point_step + place(c).
template <typename Place>
FASTRES_INLINE void transform_input(const ConvArgs& conv, const Tile& tile, float* v, int64_t point_step, Place place) {
  const float* pixels[4][4];
  for (int y = 0; y < 4; ++y)
    for (int x = 0; x < 4; ++x) pixels[y][x] = pixel_at(conv, tile, y, x);
  for (int64_t c = 0; c < conv.run; c += kWide) {
    Sum rows[4][4], points[4];
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      Sum d[4];
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) d[x] = pixels[y][x] ? load<float, kWide>(pixels[y][x] + c, Whole{}) : Sum{};
      transform_row(d, rows[y]);
    }
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      const Sum column[4] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
      transform_row(column, points);
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) store<kWide>(v + (y * 4 + x) * point_step + place(c), points[y], Whole{});
    }
  }
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
