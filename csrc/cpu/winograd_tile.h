// What the kernels of Winograd's F(2x2, 3x3) share: 2x2 output tiles, the 4x4 pixels of x under them and their transform.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/conv_tile.h"
#include "cpu/winograd.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

constexpr int64_t kPoints = kWinogradPoints;
template <typename scalar_t>
constexpr int64_t kPerWord = kWord / static_cast<int64_t>(sizeof(scalar_t));

struct Tile {
  int64_t image, row, col;  // of its first output
};

FASTRES_INLINE Tile tile_at(const WinogradArgs& args, int64_t index) {
  const int64_t line = index / args.tiles_w;
  return {line / args.tiles_h, line % args.tiles_h * 2, index % args.tiles_w * 2};
}

// A pixel of x under a tile; null in the padding.
template <typename scalar_t>
FASTRES_INLINE const scalar_t* pixel_at(const ConvArgs& conv, const Tile& tile, int64_t y, int64_t x) {
  const int64_t row = tile.row + y - conv.pad_h, col = tile.col + x - conv.pad_w;
  if (static_cast<uint64_t>(row) >= static_cast<uint64_t>(conv.height) ||
      static_cast<uint64_t>(col) >= static_cast<uint64_t>(conv.width))
    return nullptr;
  return reinterpret_cast<const scalar_t*>(static_cast<const char*>(conv.x) + tile.image * conv.image_step +
                                           row * conv.row_step + col * conv.pixel_step);
}

template <typename scalar_t>
struct Pixels {
  const scalar_t* at[4][4];

  FASTRES_INLINE Pixels(const ConvArgs& conv, const Tile& tile) {
    for (int y = 0; y < 4; ++y)
      for (int x = 0; x < 4; ++x) at[y][x] = pixel_at<scalar_t>(conv, tile, y, x);
  }
};

FASTRES_INLINE void transform_row(const Sum (&d)[4], Sum (&out)[4]) {  // a row of B'
  out[0] = d[0] - d[2];
  out[1] = d[1] + d[2];
  out[2] = d[2] - d[1];
  out[3] = d[1] - d[3];
}

// B' d B of a vector of channels from c on.
template <typename scalar_t>
FASTRES_INLINE void transform_pixels(const Pixels<scalar_t>& pixels, int64_t c, Sum (&points)[kPoints]) {
  Sum rows[4][4];
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y) {
    Sum d[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) d[x] = pixels.at[y][x] ? load<float, kWide>(pixels.at[y][x] + c, Whole{}) : Sum{};
    transform_row(d, rows[y]);
  }
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const Sum column[4] = {rows[0][x], rows[1][x], rows[2][x], rows[3][x]};
    Sum out[4];
    transform_row(column, out);
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) points[y * 4 + x] = out[y];
  }
}

// ---- a point, rounded to what is multiplied ---------------------------------------------------------

FASTRES_INLINE void put(float* to, Sum point) { store<kWide>(to, point, Whole{}); }
#if FASTRES_CPU_LEVEL >= 4
FASTRES_DOT FASTRES_INLINE void put(bf16* to, Sum point) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)point);
  memcpy(to, &rounded, sizeof(rounded));
}
// Words of two values that are multiplied together.
FASTRES_DOT FASTRES_INLINE void put_words(float* to, Sum first, Sum second) {
  const auto low = (Vec<uint16_t, kWide>)_mm512_cvtneps_pbh((__m512)first);
  const auto high = (Vec<uint16_t, kWide>)_mm512_cvtneps_pbh((__m512)second);
  put(to, (Sum)(to_32<kWide>(low) | to_32<kWide>(high) << 16));
}
#endif

// What is put at once: words of one value, or of two.
template <typename scalar_t>
FASTRES_DOT FASTRES_INLINE void put_points(float* to, int64_t point_step, const Sum (&points)[kPerWord<scalar_t>][kPoints]) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kPoints; ++i) {
#if FASTRES_CPU_LEVEL >= 4
    if constexpr (kPerWord<scalar_t> == 2) put_words(to + i * point_step, points[0][i], points[1][i]);
    else put(to + i * point_step, points[0][i]);
#else
    put(to + i * point_step, points[0][i]);
#endif
  }
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
