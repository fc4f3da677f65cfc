// Formula: dw[k, tap, c] = sum over places of dy[place, k] * x[place + tap, c]: (channels, words) times (words, channels).
// Layout: both are packed from channels last, a group of words at a time: interleaved in pairs of images, one also transposed.
// Bytes per word: each channel's pair read, written and read again, from L2 while a group fits; the sums once a group.
// Accumulate type: float in the order of places, subnormals taken for zero; then the parts' sums. One rounding, at the end.
// Invariants: the same bits for any number of threads; values that are not finite are reported: the grid's zeros spread them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/conv_backward_weight_amx.h"

#include "cpu/tile_registers.h"
#include "cpu/words.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
namespace {

constexpr int64_t kRowBytes = kAmxChannels * kWord;
constexpr int64_t kTileSize = kTileRows * kTileBytes;
constexpr int64_t kBlockSums = kAmxChannels * kAmxChannels;

// ---- words -------------------------------------------------------------------------------------------

// The two pixels of a word; null where there is none.
struct Word {
  const bf16 *a, *b;
};

// Goes through the words of a grid, from any on: those before the first and after the last have no pixels.
class Walk {
 public:
  FASTRES_INLINE Walk(const ConvBackwardWeightArgs& args, const GridPixels& pixels, int64_t word)
      : args_(args), pixels_(pixels), pair_(floor_div(word, args.grid_h * args.grid_w)) {
    const int64_t place = word - pair_ * args.grid_h * args.grid_w;
    row_ = place / args.grid_w, col_ = place % args.grid_w;
  }

  FASTRES_INLINE Word next() {
    Word word{nullptr, nullptr};
    if (row_ < pixels_.rows && col_ < pixels_.cols && pair_ >= 0 && pair_ < args_.pairs) {
      const char* at = pixels_.first + pair_ * pixels_.image_step + row_ * pixels_.row_step + col_ * pixels_.pixel_step;
      word.a = reinterpret_cast<const bf16*>(at);
      if (pair_ + args_.pairs < args_.images) word.b = reinterpret_cast<const bf16*>(at + args_.pairs * pixels_.image_step);
    }
    if (++col_ == args_.grid_w) {
      col_ = 0;
      if (++row_ == args_.grid_h) row_ = 0, ++pair_;
    }
    return word;
  }

 private:
  static FASTRES_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

  const ConvBackwardWeightArgs& args_;
  const GridPixels& pixels_;
  int64_t pair_, row_, col_;
};

FASTRES_INLINE const bf16* from(const bf16* pixel, int64_t channel) { return pixel == nullptr ? nullptr : pixel + channel; }

void pack_right(const ConvBackwardWeightArgs& args, int64_t grid, int64_t begin, int64_t end) {
  const GridPixels& pixels = args.right[grid];
  const int64_t rows = args.count + args.span, block_bytes = rows * kRowBytes, whole = pixels.channels / kAmxChannels;
  char* to = args.right_rows + grid * amx_blocks(pixels) * block_bytes + begin * kRowBytes;
  Walk walk(args, pixels, args.first + args.least_step + begin);
  for (int64_t row = begin; row < end; ++row, to += kRowBytes) {
    const Word word = walk.next();
    for (int64_t block = 0; block < whole; ++block) {
      const __m512i a = values(from(word.a, block * kAmxChannels)), b = values(from(word.b, block * kAmxChannels));
      _mm512_store_si512(to + block * block_bytes, pairs_of(a, b, 0));
      _mm512_store_si512(to + block * block_bytes + kVectorBytes, pairs_of(a, b, kWide));
    }
    if (whole * kAmxChannels < pixels.channels) {
      const int64_t channel = whole * kAmxChannels;
      const __m512i a = half_values(from(word.a, channel)), b = half_values(from(word.b, channel));
      _mm512_store_si512(to + whole * block_bytes, pairs_of(a, b, 0));
    }
  }
}

void pack_left(const ConvBackwardWeightArgs& args, int64_t step) {
  Walk walk(args, args.left, args.first + step * kTileRows);
  Word words[kTileRows];
  for (Word& word : words) word = walk.next();
  char* to = args.left_tiles + step * kTileSize;
  for (int64_t channel = 0; channel < args.left.channels; channel += kWide, to += args.count / kTileRows * kTileSize) {
    Sum rows[kWide];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWide; ++i)
      rows[i] = (Sum)pairs_of(half_values(from(words[i].a, channel)), half_values(from(words[i].b, channel)), 0);
    transpose(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kWide; ++i) _mm512_store_si512(to + i * kTileBytes, (__m512i)rows[i]);
  }
}

// ---- the product -------------------------------------------------------------------------------------

// Which sums a unit is: those of a tap and up to kAmxChannels channels on either side.
struct Block {
  int64_t across, down, tap;

  FASTRES_INLINE Block(const ConvBackwardWeightArgs& args, int64_t unit)
      : across(unit / (amx_blocks(args.left) * args.taps)), down(unit / args.taps % amx_blocks(args.left)), tap(unit % args.taps) {}
};

// Tiles of sums: 16 kDown channels of the left by 16 kAcross of the right. Steps in bytes, from tile to tile.
template <int kDown, int kAcross>
FASTRES_INLINE void multiply(const char* left, int64_t down_step, const char* right, int64_t steps, bool is_first, float* sums) {
  constexpr int64_t kDownSums = kTileRows * kAmxChannels;
  if (is_first) {
    zero_tile<0>();
    if constexpr (kAcross == 2) zero_tile<1>();
    if constexpr (kDown == 2) zero_tile<2>();
    if constexpr (kDown == 2 && kAcross == 2) zero_tile<3>();
  } else {
    load_tile<0>(sums, kRowBytes);
    if constexpr (kAcross == 2) load_tile<1>(sums + kWide, kRowBytes);
    if constexpr (kDown == 2) load_tile<2>(sums + kDownSums, kRowBytes);
    if constexpr (kDown == 2 && kAcross == 2) load_tile<3>(sums + kDownSums + kWide, kRowBytes);
  }
  for (int64_t step = 0; step < steps; ++step, left += kTileSize, right += kTileRows * kRowBytes) {
    load_tile<6>(right, kRowBytes);
    load_tile<4>(left, kTileBytes);
    multiply_tiles<bf16, 0, 4, 6>();
    if constexpr (kDown == 2) {
      load_tile<5>(left + down_step, kTileBytes);
      multiply_tiles<bf16, 2, 5, 6>();
    }
    if constexpr (kAcross == 2) {
      load_tile<7>(right + kVectorBytes, kRowBytes);
      multiply_tiles<bf16, 1, 4, 7>();
      if constexpr (kDown == 2) multiply_tiles<bf16, 3, 5, 7>();
    }
  }
  store_tile<0>(sums, kRowBytes);
  if constexpr (kAcross == 2) store_tile<1>(sums + kWide, kRowBytes);
  if constexpr (kDown == 2) store_tile<2>(sums + kDownSums, kRowBytes);
  if constexpr (kDown == 2 && kAcross == 2) store_tile<3>(sums + kDownSums + kWide, kRowBytes);
}

// ---- the gradient ------------------------------------------------------------------------------------

// Rounds the sums of a block, over all parts; `nothing` stays zero while all are finite.
void finish_block(const ConvBackwardWeightArgs& args, const Block& block, const float* sums, Sum& nothing) {
  const int64_t channels = args.turned ? args.left.channels : args.right[0].channels;
  const int64_t left = block.down * kAmxChannels, right = block.across * kAmxChannels;
  for (int64_t i = left; i < min(left + kAmxChannels, args.left.channels); i += kWide)
    for (int64_t j = right; j < min(right + kAmxChannels, args.right[0].channels); j += kWide) {
      Sum rows[kWide];
#pragma GCC unroll 16
      for (int64_t r = 0; r < kWide; ++r) {
        const float* from = sums + (i - left + r) * kAmxChannels + j - right;
        rows[r] = load<float, kWide>(from, Whole{});
        for (int64_t part = 1; part < args.parts; ++part) rows[r] += load<float, kWide>(from += args.part_sums, Whole{});
        nothing += rows[r] - rows[r];
      }
      if (args.turned) transpose(rows);
      const int64_t k = args.turned ? j : i, c = args.turned ? i : j;
      auto* to = static_cast<bf16*>(args.grad_weight) + (k * args.taps + block.tap) * channels + c;
#pragma GCC unroll 16
      for (int64_t r = 0; r < kWide; ++r) store<kWide>(to + r * args.taps * channels, rows[r], Whole{});
    }
}

void report(const ConvBackwardWeightArgs& args, Sum nothing) {
  if (!is_finite(nothing)) args.finite->store(false, std::memory_order_relaxed);
}

}  // namespace

void conv_backward_weight_amx_pack(const ConvBackwardWeightArgs& args, int64_t begin, int64_t end) {
  const int64_t rows = args.count + args.span, first = begin * kTileRows;
  for (int64_t step = begin; step < min(end, args.count / kTileRows); ++step) pack_left(args, step);
  for (int64_t grid = 0; grid < args.grids; ++grid) pack_right(args, grid, first, min(end * kTileRows, rows));
}

void conv_backward_weight_amx_multiply(const ConvBackwardWeightArgs& args, int64_t begin, int64_t end) {
  const int64_t steps = args.count / kTileRows, rows = args.count + args.span, down_step = steps * kTileSize;
  const bool is_first = args.first == args.start;
  Registers registers(kTileRows);
  registers.hold(kAmxPixels);  // all of full size
  alignas(64) float own[kBlockSums];
  Sum nothing{};
  for (int64_t at = begin; at < end; ++at) {
    const Block block(args, at);
    const char* left = args.left_tiles + 2 * block.down * down_step;
    const int64_t row = (args.tap_grid[block.tap] * amx_blocks(args.right[0]) + block.across) * rows;
    const char* right = args.right_rows + (row + args.tap_step[block.tap] - args.least_step) * kRowBytes;
    float* sums = args.direct ? own : args.sums + at * kBlockSums;
    const bool two_down = (block.down + 1) * kAmxChannels <= args.left.channels;
    const bool two_across = (block.across + 1) * kAmxChannels <= args.right[0].channels;
    if (two_down && two_across) multiply<2, 2>(left, down_step, right, steps, is_first, sums);
    else if (two_down) multiply<2, 1>(left, down_step, right, steps, is_first, sums);
    else if (two_across) multiply<1, 2>(left, down_step, right, steps, is_first, sums);
    else multiply<1, 1>(left, down_step, right, steps, is_first, sums);
    if (args.direct) finish_block(args, block, sums, nothing);
  }
  report(args, nothing);
}

void conv_backward_weight_amx_finish(const ConvBackwardWeightArgs& args, int64_t begin, int64_t end) {
  Sum nothing{};
  for (int64_t at = begin; at < end; ++at) finish_block(args, Block(args, at), args.sums + at * kBlockSums, nothing);
  report(args, nothing);
}
#else
void conv_backward_weight_amx_pack(const ConvBackwardWeightArgs&, int64_t, int64_t) {}  // no processor of this level has AMX
void conv_backward_weight_amx_multiply(const ConvBackwardWeightArgs&, int64_t, int64_t) {}
void conv_backward_weight_amx_finish(const ConvBackwardWeightArgs&, int64_t, int64_t) {}
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
