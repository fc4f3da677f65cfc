// Formula: those of conv_bn_act_kernel.cpp and conv_int8_kernel.cpp: (pixels, words) times (words, channels), then the same ends.
// Layout: a row of the left matrix holds the words of all taps of an output pixel: x itself where the convolution is dense, else
// gathered for a block of pixels into memory that stays in L2. The right one is the packed weights, as vector kernels read them.
// Bytes per output: a block of rows once for each block of channels, from L2; weights once per block of pixels.
// Accumulate type: float in the order of taps and channels, subnormals taken for zero; int32, exact. One rounding, at the end.
// Invariants: an output's sum is the same in every tile and for any number of threads; padding is zeros.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/conv_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/conv_finish.h"
#include "cpu/tile_registers.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
namespace {

// ---- the product -----------------------------------------------------------------------------------

// Steps in bytes. A step of the sum takes `words` of each row of x and as many rows of the weights, and fetches the lines of what
// is coming. (For the next blocks' weights, which do not lie in L2: ResNet-50 in bfloat16 was 1.17 times as fast at batch 1, 1.07
// times at batch 8. Intel Xeon with AMX, 2026-11-28.)
struct Matrices {
  const char* x;
  int64_t x_step;
  const char* weight;
  int64_t weight_step, steps, words;
  Coming coming;
};

// Up to 16 kDown pixels by 16 kAcross channels, into rows of kBlockChannels sums. The weights of the next step but one are fetched
// into L1. (1.10 times the speed at batches 1 and 8; one step later, or with the rows of x, less. Intel Xeon, 2026-11-28.)
template <typename scalar_t, int kDown, int kAcross>
FASTRES_INLINE void multiply(Matrices& m, void* sums) {
  constexpr int64_t kSumStep = kBlockChannels * kWord;
  zero_tile<0>();
  if constexpr (kAcross == 2) zero_tile<1>();
  if constexpr (kDown == 2) zero_tile<2>();
  if constexpr (kDown == 2 && kAcross == 2) zero_tile<3>();
  const char *x = m.x, *weight = m.weight;
  for (int64_t step = 0; step < m.steps; ++step) {
    for (int64_t i = 0; i < m.coming.lines; ++i, m.coming.from += 64) __builtin_prefetch(m.coming.from, 0, 2);
    const char* next = weight + 2 * m.words * m.weight_step;
    for (int64_t i = 0; i < m.words; ++i, next += m.weight_step)
      for (int across = 0; across < kAcross; ++across) __builtin_prefetch(next + across * kVectorBytes);
    load_tile<6>(weight, m.weight_step);
    load_tile<4>(x, m.x_step);
    multiply_tiles<scalar_t, 0, 4, 6>();
    if constexpr (kDown == 2) {
      load_tile<5>(x + kTileRows * m.x_step, m.x_step);
      multiply_tiles<scalar_t, 2, 5, 6>();
    }
    if constexpr (kAcross == 2) {
      load_tile<7>(weight + kVectorBytes, m.weight_step);
      multiply_tiles<scalar_t, 1, 4, 7>();
      if constexpr (kDown == 2) multiply_tiles<scalar_t, 3, 5, 7>();
    }
    x += m.words * kWord, weight += m.words * m.weight_step;
  }
  auto* to = static_cast<char*>(sums);
  store_tile<0>(to, kSumStep);
  if constexpr (kAcross == 2) store_tile<1>(to + kVectorBytes, kSumStep);
  if constexpr (kDown == 2) store_tile<2>(to + kTileRows * kSumStep, kSumStep);
  if constexpr (kDown == 2 && kAcross == 2) store_tile<3>(to + kTileRows * kSumStep + kVectorBytes, kSumStep);
}

// All of a block's vectors of channels.
template <typename scalar_t, int kDown>
void multiply_block(Matrices m, int64_t vectors, float* sums) {
  for (; vectors >= 2; vectors -= 2, m.weight += 2 * kVectorBytes, sums += 2 * kWide) multiply<scalar_t, kDown, 2>(m, sums);
  if (vectors == 1) multiply<scalar_t, kDown, 1>(m, sums);
}

// ---- the left matrix ---------------------------------------------------------------------------------

FASTRES_INLINE void copy(char* to, const char* from, int64_t bytes) {
  for (; bytes >= kVectorBytes; bytes -= kVectorBytes, to += kVectorBytes, from += kVectorBytes)
    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  if (bytes > 0) {
    const __mmask64 part = (uint64_t{1} << bytes) - 1;
    _mm512_mask_storeu_epi8(to, part, _mm512_maskz_loadu_epi8(part, from));
  }
}
FASTRES_INLINE void clear(char* to, int64_t bytes) { memset(to, 0, bytes); }

// The words of all taps of the pixels [begin, end), a row after the other.
void gather(const ConvArgs& args, int64_t begin, int64_t end, char* to) {
  const int64_t tap = args.run * kWord, taps = args.kernel_w * tap;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t line = pixel / args.out_w, image = line / args.out_h;
    const int64_t top = line % args.out_h * args.stride_h - args.pad_h, left = pixel % args.out_w * args.stride_w - args.pad_w;
    const bool inside = left >= 0 && left + (args.kernel_w - 1) * args.dilation_w < args.width;
    for (int64_t ky = 0; ky < args.kernel_h; ++ky, to += taps) {
      const int64_t row = top + ky * args.dilation_h;
      if (row < 0 || row >= args.height) {
        clear(to, taps);
        continue;
      }
      const char* from = static_cast<const char*>(args.x) + image * args.image_step + row * args.row_step;
      if (inside && args.dilation_w == 1) {
        copy(to, from + left * args.pixel_step, taps);
        continue;
      }
      for (int64_t kx = 0; kx < args.kernel_w; ++kx) {
        const int64_t col = left + kx * args.dilation_w;
        if (col < 0 || col >= args.width) clear(to + kx * tap, tap);
        else copy(to + kx * tap, from + col * args.pixel_step, tap);
      }
    }
  }
}

// ---- the convolution -------------------------------------------------------------------------------

// The sums of one tile: rows of kBlockChannels sums, from a pixel and a channel on; `last` lanes of the last vector
// exist.
struct Sums {
  const float* at;
  int64_t pixel, rows, channel, vectors, last;
};

// Fetches what a tile will write, and what it will add, while its sums are computed.
template <typename out_t>
FASTRES_INLINE void fetch(const ConvArgs& args, int64_t pixel, int64_t rows, int64_t channel) {
  for (int64_t p = 0; p < rows; ++p) {
    const int64_t at = (pixel + p) * args.out_step + channel;
    if (args.residual != nullptr) prefetch<kBlockChannels>(static_cast<const out_t*>(args.residual) + at);
    if (!args.stream) own<kBlockChannels>(static_cast<out_t*>(args.y) + at);
  }
}

// finish(sums) of each tile of the units [begin, end): tiles of pixels with all channels, or, where channels are shared out, tiles of
// pixels and channels, `tiles` of them to a block of channels.
template <typename scalar_t, typename Finish>
void convolve(const ConvArgs& args, int64_t begin, int64_t end, Finish finish) {
  const int64_t pixels = args.images * args.out_h * args.out_w, tiles = ceil_div(pixels, kAmxPixels);
  const int64_t depth = conv_depth(args), words = amx_words(args), row = amx_row_bytes(args);
  const int64_t stride = args.share_channels ? tiles : 0;  // units from one block of channels to the next
  const int64_t first_block = args.share_channels ? begin / tiles : 0;
  const int64_t last_block = args.share_channels ? (end - 1) / tiles : ceil_div(args.out_channels, kBlockChannels) - 1;
  const bool whole = first_block < last_block && args.share_channels;  // then some block takes all tiles of pixels
  const int64_t low = whole ? 0 : begin - first_block * stride, high = whole ? tiles : end - first_block * stride;

  const Lines gathered(args.dense ? 0 : min(args.block, high - low) * kAmxPixels * row);
  alignas(64) float sums[kAmxPixels * kBlockChannels];
  Registers registers(words);
  for (int64_t first = low; first < high; first += args.block) {
    const int64_t stop = min(first + args.block, high);
    const char* matrix = static_cast<const char*>(args.x) + first * kAmxPixels * row;
    if (!args.dense) {
      gather(args, first * kAmxPixels, min(stop * kAmxPixels, pixels), gathered.get());
      matrix = gathered.get();
    }
    for (int64_t block = first_block; block <= last_block; ++block) {
      const int64_t from = first + block * stride < begin ? begin - block * stride : first, to = min(stop, end - block * stride);
      if (from >= to) continue;  // another thread's
      const int64_t channel = block * kBlockChannels, channels = min(kBlockChannels, args.out_channels - channel);
      const int64_t vectors = ceil_div(channels, kWide), lines = depth * vectors;
      const int64_t steps = depth / words, lines_a_step = ceil_div(lines, (to - from) * steps * ceil_div(vectors, 2));
      const auto* weight = static_cast<const char*>(args.weight) + channel * depth * kWord;
      for (int64_t tile = from; tile < to; ++tile) {
        const int64_t pixel = tile * kAmxPixels, rows = min(kAmxPixels, pixels - pixel);
        const Coming coming{weight + (lines + (tile - from) * lines / (to - from)) * kVectorBytes, lines_a_step};
        const char* x = matrix + (tile - first) * kAmxPixels * row;
        const Matrices m{x, row, weight, vectors * kVectorBytes, steps, words, coming};
        fetch<scalar_t>(args, pixel, rows, channel);
        registers.hold(rows);
        if (rows > kTileRows) multiply_block<scalar_t, 2>(m, vectors, sums);
        else multiply_block<scalar_t, 1>(m, vectors, sums);
        finish(Sums{sums, pixel, rows, channel, vectors, channels - (vectors - 1) * kWide});
      }
    }
  }
}

FASTRES_DOT void finish_sums(const ConvArgs& args, Sums sums) {
  const auto* residual = static_cast<const bf16*>(args.residual);
  auto* y = static_cast<bf16*>(args.y);
  const float* bias = args.bias + sums.channel;
  const bool whole = sums.vectors == kMostVectors && sums.last == kWide && !args.stream;
  for (int64_t p = 0; p < sums.rows; ++p, sums.at += kBlockChannels) {
    const int64_t at = (sums.pixel + p) * args.out_step + sums.channel;
    Sum sum[1][kMostVectors];
    for (int v = 0; v < kMostVectors; ++v) sum[0][v] = load<float, kWide>(sums.at + v * kWide, Whole{});
    if (whole && residual != nullptr) finish_tile<true>(args, sum, bias, y + at, residual + at);
    else if (whole) finish_tile<false>(args, sum, bias, y + at, residual);
    else
      for (int64_t v = 0; v < sums.vectors; ++v) {
        const int64_t to = at + v * kWide;
        if (args.stream) finish(args, sum[0][v], bias + v * kWide, y, residual, to, Stream{});
        else if (v + 1 < sums.vectors) finish(args, sum[0][v], bias + v * kWide, y, residual, to, Whole{});
        else finish(args, sum[0][v], bias + v * kWide, y, residual, to, Part{sums.last});
      }
  }
}

FASTRES_DOT void finish_sums(const ConvInt8Args& args, Sums sums) {
  const auto* residual = static_cast<const uint8_t*>(args.conv.residual);
  auto* y = static_cast<uint8_t*>(args.conv.y);
  const float *scale = args.scale + sums.channel, *bias = args.conv.bias + sums.channel;
  const bool whole = sums.vectors == kMostVectors && sums.last == kWide && !args.float_y;
  for (int64_t p = 0; p < sums.rows; ++p, sums.at += kBlockChannels) {
    const int64_t at = (sums.pixel + p) * args.conv.out_channels + sums.channel;
    IntSum sum[kMostVectors];
    for (int v = 0; v < kMostVectors; ++v) sum[v] = (IntSum)_mm512_load_si512(sums.at + v * kWide);
    if (whole && residual != nullptr) finish_packed<true>(args, sum, scale, bias, residual + at, y + at);
    else if (whole) finish_packed<false>(args, sum, scale, bias, nullptr, y + at);
    else
      for (int64_t v = 0; v < sums.vectors; ++v)
        finish(args, sum[v], scale + v * kWide, bias + v * kWide, at + v * kWide,
               v + 1 < sums.vectors ? 0xffff : static_cast<__mmask16>((1u << sums.last) - 1));
  }
}

}  // namespace

void conv_bn_act_amx(const ConvArgs& args, int64_t begin, int64_t end) {
  convolve<bf16>(args, begin, end, [&](const Sums& sums) { finish_sums(args, sums); });
  if (args.stream) stream_fence();
}

void conv_int8_amx(const ConvInt8Args& args, int64_t begin, int64_t end) {
  convolve<uint8_t>(args.conv, begin, end, [&](const Sums& sums) { finish_sums(args, sums); });
}
#else
void conv_bn_act_amx(const ConvArgs&, int64_t, int64_t) {}  // no processor of this level has the instructions
void conv_int8_amx(const ConvInt8Args&, int64_t, int64_t) {}
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif

#if !defined(FASTRES_CPU_LEVEL) || FASTRES_CPU_LEVEL == 1  // once, in instructions of any machine
namespace fastres::cpu {

bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  static const bool has = [] {
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM: for all threads, those to come too
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_bf16_dot() && has_int8_dot() && __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAll) == kAll &&
           syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace fastres::cpu
#endif
