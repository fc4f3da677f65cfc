// Formula: none: weights move.
// Layout: from output channel, tap, channel to block of output channels, tap, pair of channels, output channel; or turned.
// Bytes per weight: one value read and one written.
// Accumulate type: none.
// Invariants: every value is copied; those that are not finite are reported, since padding would multiply them by zero.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/conv_amx.h"
#include "cpu/words.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
namespace {

constexpr int64_t kValues = 32;  // in a register: of 16 words

// Whether some value has an exponent of ones alone.
FASTRES_INLINE bool has_nonfinite(__m512i v) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  return _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, exponent), exponent) != 0;
}

// One tap of a block of `width` output channels: squares of 16 channels by 16 words, transposed. Returns whether all is finite.
bool pack(const bf16* from, int64_t step, int64_t channels, int64_t width, float* to) {
  bool nonfinite = false;
  for (int64_t k = 0; k < width; k += kWide)
    for (int64_t c = 0; c < channels; c += kValues) {
      const int64_t words = min(kValues, channels - c) / 2;
      Sum rows[kWide];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWide; ++i) {
        const bf16* row = from + (k + i) * step + c;
        const __m512i v = words == kWide ? values(row) : half_values(row);
        nonfinite |= has_nonfinite(v);
        rows[i] = (Sum)v;
      }
      transpose(rows);
      for (int64_t word = 0; word < words; ++word) store<kWide>(to + (c / 2 + word) * width + k, rows[word], Whole{});
    }
  return !nonfinite;
}

// The same with channels exchanged: pairs of rows, interleaved.
bool pack_turned(const bf16* from, int64_t step, int64_t rows, int64_t width, float* to) {
  bool nonfinite = false;
  for (int64_t k = 0; k < rows; k += 2, to += width)
    for (int64_t c = 0; c < width; c += kWide) {
      const __m512i a = half_values(from + k * step + c), b = half_values(from + (k + 1) * step + c);
      const __m512i both = pairs_of(a, b, 0);
      nonfinite |= has_nonfinite(both);
      _mm512_storeu_si512(to + c, both);
    }
  return !nonfinite;
}

}  // namespace

void conv_amx_pack(const ConvAmxPackArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.taps_h * args.taps_w, step = args.kernel_h * args.kernel_w * args.channels;
  const int64_t packed = args.turned ? args.channels : args.out_channels, summed = args.turned ? args.out_channels : args.channels;
  bool finite = true;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at / taps * kBlockChannels, width = min(kBlockChannels, packed - first), tap = at % taps;
    const int64_t y = args.turned ? args.taps_h - 1 - tap / args.taps_w : tap / args.taps_w;
    const int64_t x = args.turned ? args.taps_w - 1 - tap % args.taps_w : tap % args.taps_w;
    const int64_t source = (args.first_h + y * args.step_h) * args.kernel_w + args.first_w + x * args.step_w;
    const bf16* from = static_cast<const bf16*>(args.weight) + source * args.channels + (args.turned ? first : first * step);
    float* to = static_cast<float*>(args.packed) + (first * taps + tap * width) * summed / 2;
    finite &= args.turned ? pack_turned(from, step, summed, width, to) : pack(from, step, summed, width, to);
  }
  if (!finite) args.finite->store(false, std::memory_order_relaxed);
}
#else
void conv_amx_pack(const ConvAmxPackArgs&, int64_t, int64_t) {}  // no processor of this level has AMX
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
