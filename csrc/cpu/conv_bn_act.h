// Arguments and kernel of the convolution with batch norm folded into its weights; a range counts units of its output.
#pragma once

#include "common/types.h"
#include "cpu/level.h"

namespace fastres::cpu {

// A tile is `pixels` neighbouring output pixels by `channels` output channels: what the registers of this machine hold.
// Channels come in vectors of `lanes`.
struct ConvTile {
  int64_t pixels, channels, lanes;
};
inline ConvTile conv_tile() { return cpu_level() >= 4 ? ConvTile{7, 64, 16} : ConvTile{6, 16, 8}; }

constexpr int64_t kConvMostRun = 16384;  // words that a tap may read, zeros for padding included

// Sizes in pixels, steps of x in bytes. A tap reads a run of words of 32 bits from a pixel of x on, one float32 or two
// bfloat16 values each. Weights: for each block of `channels`, for each tap and word, a word for each output channel,
// their number rounded up to whole vectors. A convolution in groups runs in slices, each as a convolution of its own: a group,
// or as many groups as make a vector, whose channels then read `run` words of their own group only.
struct ConvArgs {
  DType dtype;  // of x, weight, residual and y: float32 or bfloat16
  Act act;
  bool stream;  // write y past the caches: y is aligned and out_channels are whole vectors
  const void* x;
  const void* weight;
  const float* bias;
  const void* residual;  // or null
  void* y;
  int64_t images, height, width, image_step, row_step, pixel_step;
  int64_t out_h, out_w, out_channels;
  int64_t out_step;  // values of a pixel of y and of the residual: more than out_channels in a slice
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, run;
  bool dense;     // 1x1, stride 1, no padding: each pixel of y reads the same pixel of x
  bool share_channels;  // a unit is a tile of the output, in the order of channels; else a tile of pixels, all channels
  int64_t block;        // tiles of pixels for which all channels are computed before the next ones
  int64_t group = 0;    // channels of a group, of x and of y, where a vector holds one or several; else 0
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Words of x, over all taps, in the sum of an output.
inline int64_t conv_depth(const ConvArgs& args) { return args.kernel_h * args.kernel_w * args.run; }
inline int64_t conv_pixel_tiles(const ConvArgs& args) {
  return ceil_div(args.images * args.out_h * args.out_w, conv_tile().pixels);
}
inline int64_t conv_channel_blocks(const ConvArgs& args) { return ceil_div(args.out_channels, conv_tile().channels); }

FASTRES_FMA_KERNEL(conv_bn_act_forward, ConvArgs)

constexpr int64_t kGroupsChannels = 256;  // for which a thread finds where the taps of a tile of pixels begin
FASTRES_FMA_KERNEL(conv_groups_forward, ConvArgs)  // a range counts tiles of pixels times parts of so many channels

}  // namespace fastres::cpu
