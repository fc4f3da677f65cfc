// The weight gradient of a convolution in bfloat16 as products of matrices in tile registers (AMX).
#pragma once

#include <atomic>

#include "cpu/conv_amx.h"

namespace fastres::cpu {

// The sum over images and places of the output of grad_y[place, k] * x[place + tap, c]. Both lie on one grid of places, row by
// row and image after image, with zeros between the rows and images, so that a tap is a step along the grid, the same for all
// places. With a stride, x lies on several grids: each has the pixels that some taps meet. A word is the same place in two images.

// Pixels on a grid: those of grad_y, or some of x. Steps in bytes.
struct GridPixels {
  const char* first;
  int64_t channels, rows, cols, image_step, row_step, pixel_step;
};

// A product has the transposed words of some channels on its left, in tiles, and words of other channels on its right, in rows of
// kAmxChannels; all channels come in whole vectors. Passes: for every group of words pack them, then multiply; where there are
// several groups, then add up the parts, and round.
struct ConvBackwardWeightArgs {
  GridPixels left;
  const GridPixels* right;    // of each grid
  int64_t grids, grid_h, grid_w, images, pairs;  // image i is joined with image i + pairs
  int64_t taps;
  const int64_t* tap_grid;    // on the right, of each tap
  const int64_t* tap_step;    // from a word on the left to one on the right, at least `least_step`, at most that + `span`
  int64_t least_step, span;
  bool turned;                // the left are x's channels, the right grad_y's; with one tap only
  char* left_tiles;           // of a group: block of 16 channels, kTileRows words, channel, word
  char* right_rows;           // of a group: grid, block of kAmxChannels, word, channel
  float* sums;                // of a part: blocks in the order of units, channel of the left, channel of the right
  bool direct;                // one group has all words: sums are rounded at once, and not kept
  void* grad_weight;          // output channel, tap, channel
  int64_t first, count;       // words of the group; count in whole tiles
  int64_t start;              // the first word of its part
  int64_t parts, part_sums;   // how many parts have sums of their own, and how many
  std::atomic<bool>* finite;  // becomes false where a gradient is not finite
};

constexpr int64_t kAmxChannels = 32;  // by as many: the sums of two tiles by two
inline int64_t amx_blocks(const GridPixels& pixels) { return ceil_div(pixels.channels, kAmxChannels); }
inline int64_t left_bytes(const ConvBackwardWeightArgs& args) { return args.left.channels * args.count * 4; }
inline int64_t right_bytes(const ConvBackwardWeightArgs& args) {
  return args.grids * amx_blocks(args.right[0]) * (args.count + args.span) * kAmxChannels * 4;
}
inline int64_t pack_units(const ConvBackwardWeightArgs& args) { return ceil_div(args.count + args.span, kTileRows); }
inline int64_t multiply_units(const ConvBackwardWeightArgs& args) {
  return amx_blocks(args.left) * amx_blocks(args.right[0]) * args.taps;
}

FASTRES_FMA_KERNEL(conv_backward_weight_amx_pack, ConvBackwardWeightArgs)      // a range counts kTileRows words
FASTRES_FMA_KERNEL(conv_backward_weight_amx_multiply, ConvBackwardWeightArgs)  // blocks of the right by blocks of the left by taps
FASTRES_FMA_KERNEL(conv_backward_weight_amx_finish, ConvBackwardWeightArgs)    // the same

}  // namespace fastres::cpu
