// Formula: images converted; the largest or the mean of a window; x * scale + bias; a * a_scale + b * b_scale + bias.
// Layout: channels last; a thread owns rows of y (images, pools), pixels (bn) or elements (add), vectors run along the channels.
// Bytes per output: what a step reads, once, mostly from L2, and one write.
// Accumulate type: int32 sums, exact; float scales; one rounding, to even, saturated to 0..255.
// Invariants: every window touches its image, which the binding checks; x of an addition may be y.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of GCC 12's own AVX-512 headers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "cpu/plan_int8.h"

#include "cpu/loops.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {

#if FASTRES_CPU_LEVEL >= 4
namespace {

constexpr int64_t kLanes16 = 16, kBytes = 64;

FASTRES_INLINE __mmask16 lanes_of(int64_t left) { return left >= kLanes16 ? 0xffff : (1u << left) - 1; }

FASTRES_INLINE __m512i saturate(__m512 v) {
  const __m512 held = _mm512_min_ps(_mm512_max_ps(v, _mm512_setzero_ps()), _mm512_set1_ps(255.0f));
  return _mm512_cvtps_epi32(held);
}
FASTRES_INLINE void store_bytes(uint8_t* to, __mmask16 mask, __m512 v) {
  _mm_mask_storeu_epi8(to, mask, _mm512_cvtepi32_epi8(saturate(v)));
}
FASTRES_INLINE __m512i load_bytes(const uint8_t* from, __mmask16 mask) {
  return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, from));
}
FASTRES_INLINE __m512 load_floats(const uint8_t* from, __mmask16 mask) { return _mm512_cvtepi32_ps(load_bytes(from, mask)); }

// A line of pixels of up to four channels from float planes, 16 pixels at a time.

FASTRES_INLINE __m512 plane(const ImageArgs& args, const float* x, int64_t c, int64_t w, __mmask16 mask) {
  return c < args.channels ? _mm512_maskz_loadu_ps(mask, x + c * args.channel_step + w) : _mm512_setzero_ps();
}

// False where a value is not finite.
FASTRES_INLINE bool convert_planes(const ImageArgs& args, const float* x, uint8_t* y) {
  const __m512 scale = _mm512_set1_ps(args.scale), zero = _mm512_set1_ps(args.zero);
  __mmask16 strange = 0;
  for (int64_t w = 0; w < args.width; w += kLanes16) {
    const __mmask16 mask = lanes_of(args.width - w);
    __m512i word = _mm512_setzero_si512();
    for (int64_t c = 3; c >= 0; --c) {
      const __m512 v = plane(args, x, c, w, mask);
      strange |= _mm512_cmp_ps_mask(_mm512_sub_ps(v, v), _mm512_setzero_ps(), _CMP_NEQ_UQ);
      word = _mm512_or_si512(_mm512_slli_epi32(word, 8), saturate(_mm512_fmadd_ps(v, scale, zero)));
    }
    _mm512_mask_storeu_epi32(y + 4 * w, mask, word);
  }
  return strange == 0;
}

FASTRES_INLINE bool convert_planes(const ImageArgs& args, const float* x, bf16* y) {
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t w = 0; w < args.width; w += kLanes16) {
    const int64_t left = args.width - w;
    const auto rounded = [&](int64_t c) __attribute__((always_inline)) {
      return to_32<kLanes16>(narrow<kLanes16>(bf16{}, (Vec<float, kLanes16>)plane(args, x, c, w, lanes_of(left))));
    };
    const auto low = (__m512i)(rounded(0) | rounded(1) << 16), high = (__m512i)(rounded(2) | rounded(3) << 16);
    const __m512i even = _mm512_unpacklo_epi32(low, high), odd = _mm512_unpackhi_epi32(low, high);
    _mm512_mask_storeu_epi32(y + 4 * w, lanes_of(2 * left), _mm512_permutex2var_epi64(even, first, odd));
    if (left > 8) _mm512_mask_storeu_epi32(y + 4 * w + 32, lanes_of(2 * left - 16), _mm512_permutex2var_epi64(even, second, odd));
  }
  return true;
}

// The same, of any steps.
FASTRES_INLINE bool convert_line(const ImageArgs& args, const float* x, uint8_t* y) {
  float strange = 0.0f;  // stays zero while values are finite
  for (int64_t c = 0; c < args.channels; ++c)
    for (int64_t w = 0; w < args.width; ++w) {
      const float v = x[c * args.channel_step + w * args.pixel_step];
      strange += v - v;
      const __m128 held = _mm_min_ss(_mm_max_ss(_mm_set_ss(__builtin_fmaf(v, args.scale, args.zero)), _mm_setzero_ps()),
                                     _mm_set_ss(255.0f));
      y[w * args.out_channels + c] = static_cast<uint8_t>(_mm_cvtss_si32(held));
    }
  return strange == 0.0f;
}
FASTRES_INLINE bool convert_line(const ImageArgs& args, const float* x, bf16* y) {
  for (int64_t c = 0; c < args.channels; ++c)
    for (int64_t w = 0; w < args.width; ++w) {
      const Vec<float, 1> v = {x[c * args.channel_step + w * args.pixel_step]};
      y[w * args.out_channels + c].bits = narrow<1>(bf16{}, v)[0];
    }
  return true;
}

template <typename to_t>
void convert_rows(const ImageArgs& args, int64_t begin, int64_t end) {
  const int64_t rows = args.height + 2 * args.pad_h, row_size = (args.width + 2 * args.pad_w) * args.out_channels;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / rows, row = at % rows - args.pad_h;
    auto* y = static_cast<to_t*>(args.y) + at * row_size;
    memset(y, static_cast<int>(args.zero), row_size * sizeof(to_t));
    if (row < 0 || row >= args.height) continue;
    y += args.pad_w * args.out_channels;
    const float* x = args.x + image * args.image_step + row * args.row_step;
    const bool planes = args.out_channels == 4 && args.pixel_step == 1;
    const bool finite = planes ? convert_planes(args, x, y) : convert_line(args, x, y);
    if (!finite) args.finite->store(false, std::memory_order_relaxed);
  }
}

struct Window {
  int64_t h0, h1, w0, w1;
};

// pixel(x, window, y) for each pixel of y: x the image.
template <typename Pixel>
FASTRES_INLINE void for_windows(const PoolInt8Args& args, int64_t begin, int64_t end, Pixel pixel) {
  for (int64_t at = begin; at < end; ++at) {
    const uint8_t* x = args.x + at / args.out_h * args.height * args.width * args.channels;
    const int64_t top = at % args.out_h * args.stride_h - args.pad_h;
    for (int64_t out = 0; out < args.out_w; ++out) {
      const int64_t left = out * args.stride_w - args.pad_w;
      const Window window{top < 0 ? 0 : top, min(top + args.kernel_h, args.height), left < 0 ? 0 : left,
                          min(left + args.kernel_w, args.width)};
      pixel(x, window, args.y + (at * args.out_w + out) * args.channels);
    }
  }
}

}  // namespace

void convert_images(const ImageArgs& args, int64_t begin, int64_t end) {
  if (args.quantized) convert_rows<uint8_t>(args, begin, end);
  else convert_rows<bf16>(args, begin, end);
}

void max_pool_int8(const PoolInt8Args& args, int64_t begin, int64_t end) {
  for_windows(args, begin, end, [&](const uint8_t* x, const Window& window, uint8_t* y) __attribute__((always_inline)) {
    for (int64_t c = 0; c < args.channels; c += kBytes) {
      const int64_t left = args.channels - c;
      const __mmask64 mask = left >= kBytes ? ~0ull : (1ull << left) - 1;
      __m512i best = _mm512_setzero_si512();
      for (int64_t h = window.h0; h < window.h1; ++h)
        for (int64_t w = window.w0; w < window.w1; ++w)
          best = _mm512_max_epu8(best, _mm512_maskz_loadu_epi8(mask, x + (h * args.width + w) * args.channels + c));
      _mm512_mask_storeu_epi8(y + c, mask, best);
    }
  });
}

void avg_pool_int8(const PoolInt8Args& args, int64_t begin, int64_t end) {
  for_windows(args, begin, end, [&](const uint8_t* x, const Window& window, uint8_t* y) __attribute__((always_inline)) {
    const __m512 count = _mm512_set1_ps(static_cast<float>((window.h1 - window.h0) * (window.w1 - window.w0)));
    for (int64_t c = 0; c < args.channels; c += kLanes16) {
      const __mmask16 mask = lanes_of(args.channels - c);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t h = window.h0; h < window.h1; ++h)
        for (int64_t w = window.w0; w < window.w1; ++w)
          sum = _mm512_add_epi32(sum, load_bytes(x + (h * args.width + w) * args.channels + c, mask));
      const __m512 mean = _mm512_div_ps(_mm512_cvtepi32_ps(sum), count);
      store_bytes(y + c, mask, _mm512_fmadd_ps(mean, _mm512_set1_ps(args.scale), _mm512_set1_ps(args.zero)));
    }
  });
}

void bn_int8(const BnInt8Args& args, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel)
    for (int64_t c = 0; c < args.channels; c += kLanes16) {
      const __mmask16 mask = lanes_of(args.channels - c);
      const int64_t at = pixel * args.channels + c;
      const __m512 scale = _mm512_maskz_loadu_ps(mask, args.scale + c), bias = _mm512_maskz_loadu_ps(mask, args.bias + c);
      store_bytes(args.y + at, mask, _mm512_fmadd_ps(load_floats(args.x + at, mask), scale, bias));
    }
}

void add_int8(const AddInt8Args& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kLanes16) {
    const __mmask16 mask = lanes_of(end - at);
    __m512 value = _mm512_fmadd_ps(load_floats(args.a + at, mask), _mm512_set1_ps(args.a_scale), _mm512_set1_ps(args.bias));
    if (args.b != nullptr) value = _mm512_fmadd_ps(load_floats(args.b + at, mask), _mm512_set1_ps(args.b_scale), value);
    if (args.float_y) _mm512_mask_storeu_ps(static_cast<float*>(args.y) + at, mask, value);
    else store_bytes(static_cast<uint8_t*>(args.y) + at, mask, value);
  }
}
#else  // no processor of this level multiplies bfloat16 or 8-bit integers: no plan of them runs
void convert_images(const ImageArgs&, int64_t, int64_t) {}
void max_pool_int8(const PoolInt8Args&, int64_t, int64_t) {}
void avg_pool_int8(const PoolInt8Args&, int64_t, int64_t) {}
void bn_int8(const BnInt8Args&, int64_t, int64_t) {}
void add_int8(const AddInt8Args&, int64_t, int64_t) {}
#endif

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
