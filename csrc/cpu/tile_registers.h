// The tile registers while a kernel multiplies with them: sums in 0 to 3, the left matrix in 4 and 5, the right one in 6 and 7.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/conv_amx.h"
#include "cpu/conv_tile.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 4

namespace fastres::cpu::FASTRES_LEVEL {

// The tile registers, in use from the first product to the end of this object's life; `words` are added up at a time.
class Registers {
 public:
  explicit Registers(int64_t words) : words_(static_cast<uint8_t>(words)) {}
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;
  ~Registers() { release_tiles(); }

  // Sizes them for products of so many rows, kAmxPixels at most.
  FASTRES_INLINE void hold(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const auto first = static_cast<uint8_t>(min(rows, kTileRows)), second = static_cast<uint8_t>(rows - first);
    TileSizes sizes;
    for (int tile = 0; tile < 8; ++tile) {
      sizes.rows[tile] = tile >= 6 ? words_ : tile == 2 || tile == 3 || tile == 5 ? second : first;
      sizes.bytes[tile] = sizes.rows[tile] == 0 ? 0 : tile == 4 || tile == 5 ? words_ * kWord : kTileBytes;
    }
    configure_tiles(sizes);
  }

 private:
  const uint8_t words_;
  int64_t rows_ = 0;
};

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
