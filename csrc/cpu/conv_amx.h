// The convolutions of bfloat16 or 8-bit integers as products of matrices in tile registers (AMX); a range counts units of output.
#pragma once

#include <atomic>

#include "cpu/conv_int8.h"
#include "cpu/tiles.h"

namespace fastres::cpu {

constexpr int64_t kAmxPixels = 2 * kTileRows;  // of a tile of output, with a block of channels
constexpr int64_t kAmxLeastWords = 6;          // with fewer the vector kernels are faster
constexpr int64_t kAmxBlockBytes = 512 << 10;  // of the matrix of pixels, read again for every block of channels: a part of L2
constexpr int64_t kAmxStep = int64_t{8} * 16;          // cycles of a tile's products of kTileRows words or fewer
constexpr int64_t kAmxEnd = 512;               // of its bias, activation and stores

// Words that are added up at a time, a row of a register at most: they divide all words of an output.
inline int64_t amx_words(const ConvArgs& args) {
  for (int64_t words = kTileRows;; --words)
    if (conv_depth(args) % words == 0) return words;
}

// Whether these kernels are the faster ones for a convolution in bfloat16 or 8-bit integers.
inline bool suits_amx(const ConvArgs& args) { return has_amx() && args.group == 0 && amx_words(args) >= kAmxLeastWords; }

// Bytes of the matrix's row of a pixel: of x itself where every pixel of y reads one of x, else gathered from all taps.
inline int64_t amx_row_bytes(const ConvArgs& args) {
  return args.dense ? args.pixel_step : conv_depth(args) * 4;
}

FASTRES_FMA_KERNEL(conv_bn_act_amx, ConvArgs)  // in bfloat16; with has_amx() only, as the next one
FASTRES_FMA_KERNEL(conv_int8_amx, ConvInt8Args)

// The weights of a training step in the order in which these kernels read them, in bfloat16: from output channel, tap, channel.
// With `turned` input and output channels are exchanged and the taps reversed, as the input gradient wants them. Of each side's
// taps those from a first one on are taken, every step-th.
struct ConvAmxPackArgs {
  const void* weight;
  void* packed;
  int64_t out_channels, channels, kernel_h, kernel_w;  // of the weight; channels in whole vectors
  bool turned;
  int64_t first_h, first_w, step_h, step_w, taps_h, taps_w;
  std::atomic<bool>* finite;  // becomes false where a weight is not
};
inline int64_t conv_amx_pack_units(const ConvAmxPackArgs& args) {
  return ceil_div(args.turned ? args.channels : args.out_channels, conv_tile().channels) * args.taps_h * args.taps_w;
}
FASTRES_FMA_KERNEL(conv_amx_pack, ConvAmxPackArgs)  // a range counts blocks of output channels times taps

}  // namespace fastres::cpu
