// What the convolution's binding and the plans share: how weights are packed, images padded, tiles shared out to threads.
#pragma once

#include <cstring>

#include "cpu/conv_amx.h"
#include "cpu/conv_bn_act.h"
#include "cpu/conv_int8.h"
#include "cpu/team.h"
#include "cpu/winograd.h"

namespace fastres::cpu {

constexpr int64_t kWordBytes = 4;
constexpr int64_t kBlockBytes = 256 << 10;  // of x, read again for every block of channels: a part of an L2
constexpr int64_t kBytesPerCycle = 8;       // that reach a core from beyond its cache
constexpr int64_t kLeastWork = 1 << 18;     // multiplications that are worth a thread

// What divides a convolution in groups into slices of so many channels, of which the last may have fewer: vectors that hold
// several groups, or else the groups.
struct Slices {
  int64_t channels, count, group;  // group: see ConvArgs

  Slices(int64_t out_channels, int64_t groups) {
    const int64_t own = out_channels / groups, lanes = conv_tile().lanes;
    const bool together = groups > 1 && lanes % own == 0;
    channels = together ? lanes : own;
    count = ceil_div(out_channels, channels);
    group = together ? own : 0;
  }
};

// The packed weights of a slice, and of a convolution; depth: words of x in the sum of an output.
inline int64_t slice_words(int64_t channels, int64_t depth) {
  return ceil_div(channels, conv_tile().lanes) * conv_tile().lanes * depth;
}
inline int64_t packed_words(int64_t out_channels, int64_t depth, int64_t groups = 1) {
  const Slices slices(out_channels, groups);
  return slices.count * slice_words(slices.channels, depth);
}

// What this machine lacks for a dtype, null for nothing.
inline const char* conv_lacks(DType dtype) {
  if (cpu_level() < 3) return "AVX2 and FMA";
  return dtype == DType::kBFloat16 && !has_bf16_dot() ? "AVX-512 BF16" : nullptr;
}

inline ConvArgs& conv_of(ConvArgs& args) { return args; }
inline ConvArgs& conv_of(ConvInt8Args& args) { return args.conv; }

// A tile of output as a kernel computes it: its cycles, and the bytes of x that it reads.
struct TileCost {
  int64_t pixels, cycles, x_bytes, block_bytes;
};

inline TileCost vector_cost(const ConvArgs& args) {
  const int64_t pixels = conv_tile().pixels, depth = conv_depth(args);
  return {pixels, pixels * conv_tile().channels / 16 * depth, pixels * args.stride_h * args.stride_w * args.pixel_step, kBlockBytes};
}
inline TileCost amx_cost(const ConvArgs& args) {
  const int64_t steps = conv_depth(args) / amx_words(args);
  return {kAmxPixels, steps * kAmxStep + kAmxEnd, kAmxPixels * amx_row_bytes(args), kAmxBlockBytes};
}

// A convolution shared out to threads: kernel(args, begin, end). Split by pixels, a thread reads what it wrote a layer before,
// and all weights once per block of pixels; split by channels, it reads all of x, half of it perhaps from another core, and each
// weight once. The split with fewer cycles is taken, counting rounds of tiles and bytes from beyond a core's cache; weights are
// loaded while others are multiplied.
template <typename Args, typename Kernel>
Work shared_out(Args whole, int64_t threads, Kernel kernel, TileCost (*cost_of)(const ConvArgs&)) {
  ConvArgs& args = conv_of(whole);
  args.dense = args.kernel_h * args.kernel_w * args.stride_h * args.stride_w == 1 && args.pad_h + args.pad_w == 0 &&
               args.out_h == args.height && args.out_w == args.width;  // a run may hold the taps of a row: fewer pixels
  const TileCost tile = cost_of(args);
  const int64_t tiles = ceil_div(args.images * args.out_h * args.out_w, tile.pixels), blocks = conv_channel_blocks(args);
  const int64_t x = args.images * args.image_step, weights = args.out_channels * conv_depth(args) * kWordBytes;
  args.block = std::max<int64_t>(4, tile.block_bytes / tile.x_bytes);
  const int64_t own = ceil_div(tiles, threads), reads = x <= 2 * kBlockBytes ? 1 : ceil_div(blocks, threads);
  const auto cost = [&](int64_t rounds, int64_t x_bytes, int64_t weight_bytes) {
    return std::max(rounds * tile.cycles, weight_bytes / kBytesPerCycle) + x_bytes / kBytesPerCycle;
  };
  const int64_t by_pixels = cost(own * blocks, x / threads, weights * ceil_div(own, args.block));
  const int64_t by_channels = cost(ceil_div(tiles * blocks, threads), x * reads, weights / threads);
  args.share_channels = threads > 1 && by_channels < by_pixels;
  const int64_t units = args.share_channels ? tiles * blocks : tiles;
  const int64_t work = tile.cycles * 16 * (args.share_channels ? 1 : blocks);
  return {units, ceil_div(kLeastWork, work), [whole, kernel](int64_t begin, int64_t end) { kernel(whole, begin, end); }};
}

// What this machine lacks for 8-bit integers, null for nothing.
inline const char* int8_lacks() { return has_int8_dot() ? nullptr : "AVX-512 VNNI"; }

inline Work conv_work(const ConvArgs& args, int64_t threads) {
  if (args.dtype == DType::kBFloat16 && suits_amx(args)) return shared_out(args, threads, conv_bn_act_amx, amx_cost);
  return shared_out(args, threads, conv_bn_act_forward, vector_cost);
}

inline Work conv_int8_work(const ConvInt8Args& args, int64_t threads) {
  if (suits_amx(args.conv)) return shared_out(args, threads, conv_int8_amx, amx_cost);
  return shared_out(args, threads, conv_int8_forward, vector_cost);
}

// What a grouped convolution lacks: as many channels in as out, groups of whole words. Null for nothing.
inline const char* groups_lack(int64_t channels, int64_t out_channels, int64_t groups, int64_t size) {
  const int64_t own = groups < 1 ? 0 : out_channels / groups;
  if (own < 1 || channels != out_channels || own * groups != out_channels)
    return "as many channels in as out, shared by the groups";
  if (own * size % kWordBytes != 0) return "groups of whole words";
  if (channels * size > kConvMostRun * kWordBytes) return "at most as many channels as the zeros beyond an edge";
  return nullptr;
}

// A grouped convolution; `whole` describes all of it, but its `run` that of one group.
inline Work grouped_work(const ConvArgs& whole, int64_t groups, int64_t threads) {
  const Slices slices(whole.out_channels, groups);
  ConvArgs args = whole;
  if (slices.group != 0) {
    args.group = slices.group;
    const int64_t parts = ceil_div(args.out_channels, kGroupsChannels);
    const int64_t work = conv_tile().pixels * args.out_channels / parts * conv_depth(args);
    return {conv_pixel_tiles(args) * parts, ceil_div(kLeastWork, work),
            [args](int64_t begin, int64_t end) { conv_groups_forward(args, begin, end); }};
  }
  args.out_channels = slices.channels;
  args.stream = whole.stream && slices.channels % conv_tile().lanes == 0;
  const int64_t x_bytes = whole.pixel_step / slices.count, size = element_size(whole.dtype);
  const int64_t weight_bytes = slice_words(slices.channels, conv_depth(args)) * kWordBytes;
  const auto units_of = [](const ConvArgs& one) {
    return conv_pixel_tiles(one) * (one.share_channels ? conv_channel_blocks(one) : 1);
  };
  Work work = shared_out(args, threads, [=](const ConvArgs& first, int64_t begin, int64_t end) {
    const int64_t units = units_of(first);
    for (int64_t at = begin, stop; at < end; at = stop) {
      const int64_t slice = at / units, channel = slice * first.out_channels;
      stop = std::min(end, (slice + 1) * units);
      ConvArgs one = first;
      one.x = static_cast<const char*>(first.x) + slice * x_bytes;
      one.weight = static_cast<const char*>(first.weight) + slice * weight_bytes;
      one.bias += channel;
      if (one.residual != nullptr) one.residual = static_cast<const char*>(first.residual) + channel * size;
      one.y = static_cast<char*>(first.y) + channel * size;
      conv_bn_act_forward(one, at - slice * units, stop - slice * units);
    }
  }, vector_cost);
  work.units *= slices.count;
  return work;
}

// A 3x3 convolution with stride 1, with transformed weights; channels in whole vectors. `finite` as in WinogradArgs.
inline Work winograd_work(const ConvArgs& conv, int64_t threads, std::atomic<bool>* finite = nullptr) {
  WinogradArgs args{conv, ceil_div(conv.out_h, 2), ceil_div(conv.out_w, 2), 0, finite};
  const int64_t tiles = conv.images * args.tiles_h * args.tiles_w, blocks = winograd_blocks(conv);
  const int64_t most = std::clamp<int64_t>(kWinogradBytes / (conv.run * kWinogradPoints * kWordBytes), 1, kWinogradMost);
  const int64_t least = std::min<int64_t>(most, kWinogradLeast);
  args.groups = std::max(ceil_div(tiles, most), std::min(ceil_div(tiles, least), ceil_div(threads, blocks)));
  return {args.groups * blocks, 1, [args](int64_t begin, int64_t end) { winograd_forward(args, begin, end); }};
}

inline void run_conv(const ConvArgs& args) { run_now(conv_work(args, torch::stable::get_num_threads())); }
inline void run_winograd(const ConvArgs& args, std::atomic<bool>* finite = nullptr) {
  run_now(winograd_work(args, torch::stable::get_num_threads(), finite));
}

// Images with their padding written out and `out_channels` channels, the additional ones zero, so that a row of taps is one
// contiguous run. Steps of x in elements.
struct PadArgs {
  int64_t element;  // bytes
  const void* x;
  void* y;  // images, height + 2 pad_h, width + 2 pad_w, out_channels
  int64_t images, channels, height, width, image_step, channel_step, row_step, pixel_step, out_channels, pad_h, pad_w;
  uint8_t zero = 0;  // the byte that zeros are made of
};

constexpr int64_t kPadTogether = 16;  // channels of a pixel, which are written one after the other

template <typename word_t>
void pad_rows(const PadArgs& args, int64_t begin, int64_t end) {
  const int64_t rows = args.height + 2 * args.pad_h, row_size = (args.width + 2 * args.pad_w) * args.out_channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / rows, row = at % rows - args.pad_h;
    auto* y = static_cast<word_t*>(args.y) + at * row_size;
    const bool is_filled = args.pad_w == 0 && args.out_channels == args.channels && row >= 0 && row < args.height;
    if (!is_filled) std::memset(y, args.zero, row_size * sizeof(word_t));
    if (row < 0 || row >= args.height) continue;
    y += args.pad_w * args.out_channels;
    const auto* x = static_cast<const word_t*>(args.x) + image * args.image_step + row * args.row_step;
    const bool is_dense = args.channel_step == 1 && args.pixel_step == args.channels && args.out_channels == args.channels;
    if (is_dense) {
      std::memcpy(y, x, args.width * args.channels * sizeof(word_t));
    } else if (args.channels < kPadTogether) {
      for (int64_t c = 0; c < args.channels; ++c)
        for (int64_t w = 0; w < args.width; ++w) y[w * args.out_channels + c] = x[c * args.channel_step + w * args.pixel_step];
    } else if (args.channel_step == 1) {
      for (int64_t w = 0; w < args.width; ++w)
        std::memcpy(y + w * args.out_channels, x + w * args.pixel_step, args.channels * sizeof(word_t));
    } else {
      for (int64_t first = 0; first < args.channels; first += kPadTogether)
        for (int64_t w = 0; w < args.width; ++w)
          for (int64_t c = first; c < std::min(args.channels, first + kPadTogether); ++c)
            y[w * args.out_channels + c] = x[c * args.channel_step + w * args.pixel_step];
    }
  }
}

inline Work pad_work(const PadArgs& args) {
  const int64_t row_size = (args.width + 2 * args.pad_w) * args.out_channels;
  const int64_t rows = args.images * (args.height + 2 * args.pad_h), grain = std::max<int64_t>(1, kGrain / row_size);
  return {rows, grain, [args](int64_t begin, int64_t end) {
            if (args.element == 4) pad_rows<uint32_t>(args, begin, end);
            else if (args.element == 2) pad_rows<uint16_t>(args, begin, end);
            else pad_rows<uint8_t>(args, begin, end);
          }};
}
inline void run_pad(const PadArgs& args) { run_now(pad_work(args)); }

}  // namespace fastres::cpu
