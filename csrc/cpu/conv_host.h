// What the convolution's binding and the plans share: how weights are packed, images padded, tiles shared out to threads.
#pragma once

#include <cstring>

#include "cpu/conv_bn_act.h"
#include "cpu/conv_int8.h"
#include "cpu/host.h"
#include "cpu/winograd.h"

namespace fastres::cpu {

constexpr int64_t kWordBytes = 4;
constexpr int64_t kBlockBytes = 256 << 10;  // of x, read again for every block of channels: a part of an L2
constexpr int64_t kLeastWork = 1 << 18;     // multiplications that are worth a thread

inline int64_t packed_words(int64_t out_channels, int64_t depth) {
  return ceil_div(out_channels, conv_tile().lanes) * conv_tile().lanes * depth;
}

// What this machine lacks for a dtype, null for nothing.
inline const char* conv_lacks(DType dtype) {
  if (cpu_level() < 3) return "AVX2 and FMA";
  return dtype == DType::kBFloat16 && !has_bf16_dot() ? "AVX-512 BF16" : nullptr;
}

// Shares the tiles of a convolution out to threads: kernel(args, begin, end).
template <typename Kernel>
void run_tiles(ConvArgs& args, Kernel kernel) {
  args.dense = args.kernel_h * args.kernel_w * args.stride_h * args.stride_w == 1 && args.pad_h + args.pad_w == 0;
  const int64_t tile_bytes = conv_tile().pixels * args.stride_h * args.stride_w * args.pixel_step;
  args.block = std::max<int64_t>(4, kBlockBytes / tile_bytes);
  const int64_t work = conv_tile().pixels * conv_tile().channels * args.kernel_h * args.kernel_w * args.run;
  parallel_for(0, conv_tiles(args), ceil_div(kLeastWork, work), kernel);
}

// What this machine lacks for 8-bit integers, null for nothing.
inline const char* int8_lacks() { return has_int8_dot() ? nullptr : "AVX-512 VNNI"; }

inline void run_conv(ConvArgs args) {
  run_tiles(args, [&](int64_t begin, int64_t end) { conv_bn_act_forward(args, begin, end); });
}

inline void run_conv_int8(ConvInt8Args args) {
  run_tiles(args.conv, [&](int64_t begin, int64_t end) { conv_int8_forward(args, begin, end); });
}

// A 3x3 convolution with stride 1 in float32, with transformed weights; channels in whole vectors.
inline void run_winograd(const ConvArgs& conv) {
  WinogradArgs args{conv, ceil_div(conv.out_h, 2), ceil_div(conv.out_w, 2), 0};
  const int64_t tiles = conv.images * args.tiles_h * args.tiles_w;
  const int64_t most = std::clamp<int64_t>(kWinogradBytes / (conv.run * kWinogradPoints * kWordBytes), 1, kWinogradMost);
  args.groups = ceil_div(tiles, most);
  parallel_for(0, args.groups * winograd_blocks(conv), 1,
               [&](int64_t begin, int64_t end) { winograd_forward(args, begin, end); });
}

// Images with their padding written out and `out_channels` channels, the further ones zero, so that a row of taps is one
// run of neighbours. Steps of x in elements.
struct PadArgs {
  int64_t element;  // bytes
  const void* x;
  void* y;  // images, height + 2 pad_h, width + 2 pad_w, out_channels
  int64_t images, channels, height, width, image_step, channel_step, row_step, pixel_step, out_channels, pad_h, pad_w;
  uint8_t zero = 0;  // the byte that zeros are made of
};

template <typename word_t>
void pad_rows(const PadArgs& args, int64_t begin, int64_t end) {
  const int64_t rows = args.height + 2 * args.pad_h, row_size = (args.width + 2 * args.pad_w) * args.out_channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / rows, row = at % rows - args.pad_h;
    auto* y = static_cast<word_t*>(args.y) + at * row_size;
    std::memset(y, args.zero, row_size * sizeof(word_t));
    if (row < 0 || row >= args.height) continue;
    y += args.pad_w * args.out_channels;
    const auto* x = static_cast<const word_t*>(args.x) + image * args.image_step + row * args.row_step;
    for (int64_t c = 0; c < args.channels; ++c)
      for (int64_t w = 0; w < args.width; ++w) y[w * args.out_channels + c] = x[c * args.channel_step + w * args.pixel_step];
  }
}

inline void run_pad(const PadArgs& args) {
  const int64_t row_size = (args.width + 2 * args.pad_w) * args.out_channels;
  const int64_t rows = args.images * (args.height + 2 * args.pad_h), grain = std::max<int64_t>(1, kGrain / row_size);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    if (args.element == 4) pad_rows<uint32_t>(args, begin, end);
    else if (args.element == 2) pad_rows<uint16_t>(args, begin, end);
    else pad_rows<uint8_t>(args, begin, end);
  });
}

}  // namespace fastres::cpu
