// Takes the place of csrc/cpu/tiles.h in tests: tile registers in memory, for processors without AMX. A misuse ends the process.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/types.h"

namespace fastres::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 64;

__attribute__((used)) inline bool has_amx() { return true; }

struct alignas(64) TileSizes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

namespace emulated {

struct Tile {
  int64_t rows = 0, bytes = 0;
  alignas(64) char data[kTileRows][kTileBytes];
};
inline thread_local Tile tiles[8];

inline void require(bool holds) {
  if (!holds) std::abort();
}
inline Tile& tile(int index) {
  require(tiles[index].rows > 0);  // the processor refuses registers that were not sized
  return tiles[index];
}
inline float float_of(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float number;
  memcpy(&number, &bits, sizeof(number));
  return number;
}

}  // namespace emulated

inline void configure_tiles(const TileSizes& sizes) {
  for (int i = 0; i < 8; ++i) {
    emulated::require(sizes.palette == 1 && sizes.rows[i] <= kTileRows && sizes.bytes[i] <= kTileBytes &&
                      (sizes.rows[i] == 0) == (sizes.bytes[i] == 0));
    emulated::tiles[i].rows = sizes.rows[i], emulated::tiles[i].bytes = sizes.bytes[i];
    memset(emulated::tiles[i].data, 0, sizeof(emulated::tiles[i].data));
  }
}
inline void release_tiles() {
  for (emulated::Tile& tile : emulated::tiles) tile.rows = tile.bytes = 0;
}

template <int kTile>
inline void zero_tile() {
  memset(emulated::tile(kTile).data, 0, sizeof(emulated::Tile::data));
}
template <int kTile>
inline void load_tile(const void* from, int64_t step) {
  emulated::Tile& tile = emulated::tile(kTile);
  for (int64_t r = 0; r < tile.rows; ++r) memcpy(tile.data[r], static_cast<const char*>(from) + r * step, tile.bytes);
}
template <int kTile>
inline void store_tile(void* to, int64_t step) {
  const emulated::Tile& tile = emulated::tile(kTile);
  for (int64_t r = 0; r < tile.rows; ++r) memcpy(static_cast<char*>(to) + r * step, tile.data[r], tile.bytes);
}

template <typename scalar_t, int kSum, int kLeft, int kRight>
inline void multiply_tiles() {
  emulated::Tile &sum = emulated::tile(kSum), &left = emulated::tile(kLeft), &right = emulated::tile(kRight);
  emulated::require(left.rows == sum.rows && left.bytes == 4 * right.rows && right.bytes == sum.bytes);
  for (int64_t m = 0; m < sum.rows; ++m)
    for (int64_t k = 0; k < right.rows; ++k)
      for (int64_t n = 0; n < sum.bytes / 4; ++n) {
        char* at = &sum.data[m][4 * n];
        const char *a = &left.data[m][4 * k], *b = &right.data[k][4 * n];
        if constexpr (std::is_same_v<scalar_t, bf16>) {
          uint16_t x[2], w[2];
          float total;
          memcpy(x, a, 4), memcpy(w, b, 4), memcpy(&total, at, 4);
          for (int i = 0; i < 2; ++i) total += emulated::float_of(x[i]) * emulated::float_of(w[i]);
          memcpy(at, &total, 4);
        } else {
          int32_t total;
          memcpy(&total, at, 4);
          for (int i = 0; i < 4; ++i) total += static_cast<uint8_t>(a[i]) * static_cast<int8_t>(b[i]);
          memcpy(at, &total, 4);
        }
      }
}

}  // namespace fastres::cpu
