// Arguments and kernel of the 3x3 convolution by Winograd's F(2x2, 3x3); a range counts units of tiles by channels.
#pragma once

#include <atomic>

#include "cpu/conv_bn_act.h"

namespace fastres::cpu {

constexpr int64_t kWinogradPoints = 16;         // of a transformed tile, 4x4: that many weights an input channel
// Tiles are transformed in groups, for each of which all weights come from memory once: 1024 channels of an image of 14x14 take
// 23 ms in groups of 56 tiles, 61 in groups of 8, which a thread's L2 holds (Intel Xeon with AMX, one thread, 2026-11-29).
constexpr int64_t kWinogradMost = 56;
constexpr int64_t kWinogradLeast = 16;                   // where threads would have nothing to do
constexpr int64_t kWinogradBytes = int64_t{16} << 20;    // of a thread's scratch

// From point to point of transformed tiles, in words: an odd multiple of 4 cache lines, so that the 16 points of one tile
// spread over all sets of a cache.
constexpr int64_t kApart = 64;
inline int64_t point_step(int64_t words) { return ceil_div(words - kApart, 2 * kApart) * 2 * kApart + kApart; }

// Of `conv` it reads what a 3x3 convolution with stride 1 has; weights have 16 points for 9 taps, transformed before they
// were packed: channels in whole vectors. In bfloat16 the transformed values are rounded to it.
struct WinogradArgs {
  ConvArgs conv;
  int64_t tiles_h, tiles_w;  // of 2x2 outputs, in each image
  int64_t groups;            // of tiles, over all images
  std::atomic<bool>* finite = nullptr;  // becomes false where an output is not finite; null: that one is computed directly
};

inline int64_t winograd_blocks(const ConvArgs& conv) { return ceil_div(conv.out_channels, conv_tile().channels); }

FASTRES_FMA_KERNEL(winograd_forward, WinogradArgs)  // a range counts groups times blocks of channels

}  // namespace fastres::cpu
