// Vectors in memory: loads and stores that convert from and to the storage types, whole or in part.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include <type_traits>

#include "cpu/lanes.h"

namespace fastres::cpu::FASTRES_LEVEL {

// ---- how much of a vector to move: all lanes, all lanes past the caches, or the first n lanes, 0 < n < L --

struct Whole {};
struct Stream {};
struct Part {
  int64_t n;
};
template <typename Lanes>
constexpr bool kIsWhole = !std::is_same_v<Lanes, Part>;

// How many elements a vector of L moves.
template <int64_t L, typename Lanes>
FASTRES_INLINE int64_t count_of(Lanes lanes) {
  if constexpr (kIsWhole<Lanes>) return L;
  else return lanes.n;
}

template <typename V, typename T>
FASTRES_INLINE V move_in(const T* p, Whole) {
  V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V, typename T>
FASTRES_INLINE V move_in(const T* p, Stream) {
  return move_in<V>(p, Whole{});
}
// Copies fewer than 2 * kPiece bytes, an even number: the ends of rows, too short for a call of memcpy.
template <int64_t kPiece>
FASTRES_INLINE void copy_end(char* to, const char* from, int64_t bytes) {
  const int64_t piece = bytes & kPiece;
  if (piece) memcpy(to, from, kPiece);
  if constexpr (kPiece > 2) copy_end<kPiece / 2>(to + piece, from + piece, bytes);
}

#if FASTRES_CPU_LEVEL == 3
template <typename T>
FASTRES_INLINE __m256i first_mask(Part part) {
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<Int, 32 / sizeof(Int)> lane;
  for (int64_t i = 0; i < static_cast<int64_t>(32 / sizeof(Int)); ++i) lane[i] = i;
  return (__m256i)(lane < static_cast<Int>(part.n));
}
#endif

template <typename V, typename T>
FASTRES_INLINE V move_in(const T* p, Part part) {  // lanes beyond the part are zero
#if FASTRES_CPU_LEVEL >= 4
  const uint32_t mask = (1u << part.n) - 1;
  if constexpr (sizeof(V) == 64 && sizeof(T) == 8) return (V)_mm512_maskz_loadu_epi64(mask, p);
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return (V)_mm512_maskz_loadu_epi32(mask, p);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return (V)_mm256_maskz_loadu_epi16(mask, p);
  if constexpr (sizeof(V) == 16 && sizeof(T) == 2) return (V)_mm_maskz_loadu_epi16(mask, p);
#elif FASTRES_CPU_LEVEL == 3
  const __m256i mask = first_mask<T>(part);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 8) return (V)_mm256_maskload_epi64((const long long*)p, mask);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return (V)_mm256_maskload_epi32((const int*)p, mask);
#endif
  V v{};
  copy_end<sizeof(V) / 2>((char*)&v, (const char*)p, part.n * sizeof(T));
  return v;
}

template <typename V, typename T>
FASTRES_INLINE void move_out(T* p, V v, Whole) {
  memcpy(p, &v, sizeof(v));
}
template <typename V, typename T>
FASTRES_INLINE void move_out(T* p, V v, Part part) {
#if FASTRES_CPU_LEVEL >= 4
  const uint32_t mask = (1u << part.n) - 1;
  if constexpr (sizeof(V) == 64 && sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, mask, (__m512i)v);
  if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, mask, (__m512i)v);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, mask, (__m256i)v);
  if constexpr (sizeof(V) == 16 && sizeof(T) == 2) return _mm_mask_storeu_epi16(p, mask, (__m128i)v);
#elif FASTRES_CPU_LEVEL == 3
  const __m256i mask = first_mask<T>(part);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 8) return _mm256_maskstore_epi64((long long*)p, mask, (__m256i)v);
  if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return _mm256_maskstore_epi32((int*)p, mask, (__m256i)v);
#endif
  copy_end<sizeof(V) / 2>((char*)p, (const char*)&v, part.n * sizeof(T));
}
template <typename V, typename T>
FASTRES_INLINE void move_out(T* p, V v, Stream) {  // p is aligned to the size of V
#if defined(__x86_64__)
#if FASTRES_CPU_LEVEL >= 4
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if FASTRES_CPU_LEVEL >= 3
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
#endif
  move_out(p, v, Whole{});
}

// Orders streamed stores before whatever tells another thread that they are done.
FASTRES_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- load and store with conversion: L lanes of acc_t from or to storage ---------------------

template <typename acc_t, int64_t L, typename scalar_t, typename Lanes>
FASTRES_INLINE Vec<acc_t, L> load(const scalar_t* p, Lanes lanes) {
  if constexpr (sizeof(scalar_t) == 2) return widen<L>(scalar_t{}, move_in<Vec<uint16_t, L>>(p, lanes));
  else return move_in<Vec<acc_t, L>>(p, lanes);
}

// load, of a tensor that is read in order: asks for what comes kAhead bytes later, which may lie beyond the tensor. In a
// training step of ResNet-50, whose tensors come from memory, batch norm takes 7 % less time (AMD EPYC, Zen 4, 2026-11-25).
constexpr int64_t kAhead = 2048;

template <typename acc_t, int64_t L, typename scalar_t, typename Lanes>
FASTRES_INLINE Vec<acc_t, L> read(const scalar_t* p, Lanes lanes) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
  return load<acc_t, L>(p, lanes);
}

template <int64_t L, typename scalar_t, typename V, typename Lanes>
FASTRES_INLINE void store(scalar_t* p, V v, Lanes lanes) {
  if constexpr (sizeof(scalar_t) == 2) move_out(p, narrow<L>(scalar_t{}, v), lanes);
  else move_out(p, v, lanes);
}

}  // namespace fastres::cpu::FASTRES_LEVEL
