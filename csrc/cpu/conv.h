// Arguments and kernels of a training step's convolutions: 3x3 by Winograd, whose weights are transformed at every step, with the
// weight gradient; and all three of any kernel over few pixels.
#pragma once

#include <atomic>

#include "cpu/winograd.h"

namespace fastres::cpu {

// Transforms and packs weights as the convolution reads them. Steps in elements; those of rows and columns may be negative:
// the input gradient is the convolution with each kernel rotated by 180 degrees and input and output channels exchanged.
struct ConvWeightArgs {
  DType dtype;         // float32 or bfloat16
  const void* weight;  // its first tap
  float* packed;
  int64_t out_channels, channels, out_step, channel_step, row_step, col_step;
  std::atomic<bool>* finite;  // becomes false where a transformed weight is not finite
};

inline int64_t conv_weight_vectors(const ConvWeightArgs& args) { return args.channels / conv_tile().lanes; }

FASTRES_FMA_KERNEL(conv_transform_weight, ConvWeightArgs)  // a range counts blocks of output channels times vectors of channels

// The weight gradient: the sum over tiles of A dy A' times B' d B, point by point, transformed back by G. Passes: for every group
// of tiles, transform and multiply them; then add up the parts and transform back. A word of tiles is one tile in float32, two in
// bfloat16, whose transformed values are rounded to bfloat16.
struct ConvGradArgs {
  WinogradArgs forward;  // of the convolution: x, and the tiles of its output
  const void* grad_y;    // channels last, like x
  float* points;         // of the sum: part of the tiles, point, block of x's channels, output channel, channel
  float* x_tiles;        // of a group: point, block of x's channels, word of tiles, channel
  float* y_tiles;        // of a group: point, word of tiles, output channel
  void* grad_weight;     // output channel, row, column, channel
  int64_t x_step, y_step;  // from point to point of a group's tiles, in words
  int64_t first, count;    // tiles of the group
  int64_t start;           // the first tile of its part
  int64_t parts;           // of the tiles: each has sums of its own
  std::atomic<bool>* finite;  // becomes false where a gradient is not finite
};

FASTRES_FMA_KERNEL(conv_grad_transform, ConvGradArgs)  // a range counts words of tiles of the group
FASTRES_FMA_KERNEL(conv_grad_multiply, ConvGradArgs)   // a range counts points times blocks of x's channels
FASTRES_FMA_KERNEL(conv_grad_finish, ConvGradArgs)     // a range counts output channels

// A pixel of the output and the one of x that a tap joins it to, as offsets in elements.
struct PixelPair {
  int64_t y, x;
};

// The gradients of a convolution of any kernel over few pixels: for each tap, products of the pixels that it joins.
struct ConvOuterArgs {
  DType dtype;         // float32 or bfloat16
  const void* grad_y;  // channels last, as x is
  const void* x;       // read, or the weights: output channel, tap, channel
  void* grad;          // written: of the weights, or of x
  int64_t out_channels, channels, taps, x_values;
  const PixelPair* pairs;     // of all taps, one after the other
  const int64_t* first_pair;  // of each tap, and the end
};

// The convolution of any kernel over few pixels: for each tap, inner products of weights with the pixels that it joins.
struct ConvInnerArgs {
  DType dtype;         // float32 or bfloat16
  const void* x;       // channels last, as y is
  const void* weight;  // output channel, tap, channel
  void* y;             // written
  int64_t out_channels, channels, taps, pixels;  // pixels of y
  const PixelPair* pairs;     // as above
  const int64_t* first_pair;
};

constexpr int64_t kOuterRows = 4;  // output channels in registers: they divide all output channels

FASTRES_FMA_KERNEL(conv_inner, ConvInnerArgs)  // a range counts vectors of output channels
FASTRES_FMA_KERNEL(conv_outer_weight, ConvOuterArgs)        // of the weights; a range counts blocks of kOuterRows output channels
FASTRES_FMA_KERNEL(conv_outer_input, ConvOuterArgs)  // of x; a range counts vectors of channels

}  // namespace fastres::cpu
