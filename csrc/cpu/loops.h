// The loops that all CPU kernels share: over elements, and over channels with one accumulator pair per channel.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "cpu/vec.h"

namespace fastres::cpu::FASTRES_LEVEL {

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <typename F>
FASTRES_INLINE void with_bool(bool value, F f) {
  if (value) f(Bool<true>{});
  else f(Bool<false>{});
}

template <typename F>
FASTRES_INLINE void with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(bf16{});
    case DType::kFloat16: return f(fp16{});
    case DType::kFloat64: return f(double{});
  }
}

// body(i, lanes) for L elements at a time of [0, count). With `stream` all but the ends are Stream, aligned by `out`.
template <int64_t L, typename scalar_t, typename Body>
FASTRES_INLINE void for_each(int64_t count, const scalar_t* out, bool stream, Body body) {
  int64_t i = 0;
  if (stream) {
    constexpr uintptr_t kAlign = L * sizeof(scalar_t);
    const auto head = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out)) % kAlign / sizeof(scalar_t));
    if (head > 0) body(0, Part{i = min(head, count)});
    for (; i + L <= count; i += L) body(i, Stream{});
  } else {
    for (; i + L <= count; i += L) body(i, Whole{});
  }
  if (i < count) body(i, Part{count - i});
}

// A per-channel value for L neighbouring elements: one of a table with an entry per element, or one value for all.
template <typename T, int64_t L, bool kChannelsLast, typename acc_t>
FASTRES_INLINE Vec<T, L> channel_value(const acc_t* table, int64_t entry) {
  if constexpr (kChannelsLast) return load<T, L>(table + entry, Whole{});
  else return static_cast<T>(table[entry]) - Vec<T, L>{};
}

// ---- reductions: two sums per channel -----------------------------------------------------------------

template <typename V>
struct Pair {
  V a, b;
};

// A few terms are added in their own type, their sums in double: as exact as double for all practical purposes, and most of
// the work is done in full float vectors.
constexpr int64_t kGroup = 4;
constexpr int64_t kDoubles = kLanes<double>;

template <int64_t L, typename V>
FASTRES_INLINE V first_lanes(V v, int64_t n) {
  decltype(v < v) lane{};
  for (int64_t i = 0; i < L; ++i) lane[i] = i;
  return lane < static_cast<decltype(+lane[0])>(n) ? v : V{};
}

// f(i, Vec<double, kDoubles>) for the pieces of v, which start at lane i.
template <typename acc_t, int64_t L, typename F>
FASTRES_INLINE void for_doubles(Vec<acc_t, L> v, F f) {
  struct {
    Vec<acc_t, kDoubles> of[L / kDoubles];
  } pieces;
  memcpy(&pieces, &v, sizeof(v));
  for (int64_t i = 0; i < L; i += kDoubles) f(i, to_double<kDoubles>(pieces.of[i / kDoubles]));
}

// Channels last: a pair of sums per column, over rows [begin, end) of a tensor that ends after `numel` elements, maybe inside
// a row. term(offset, col, lanes) -> Pair. The sums of kRun rows grow in the near cache, kBlock columns at a time, and join
// those in double. Memory is read in order: of several rows at a time the hardware does not foresee the next line, and
// bn_add_act's backward at 32x256x56x56 in bf16 took 1.7 times as long (AMD EPYC, Zen 4, 2026-11-25).
constexpr int64_t kRun = 32, kBlock = 1024;

template <typename acc_t, int64_t L, typename Term>
FASTRES_INLINE void reduce_rows(int64_t begin, int64_t end, int64_t cols, int64_t numel, double* sum_a, double* sum_b,
                                Term term) {
  alignas(kVectorBytes) acc_t near_a[kBlock] = {}, near_b[kBlock] = {};
  const auto add = [](acc_t* near, auto v) { store<L>(near, load<acc_t, L>(near, Whole{}) + v, Whole{}); };
  const auto flush = [](double* sum, acc_t* near, int64_t count) {
    for (int64_t i = 0; i < count; i += kDoubles) {
      const auto piece = to_double<kDoubles>(load<acc_t, kDoubles>(near + i, Whole{}));
      store<kDoubles>(sum + i, load<double, kDoubles>(sum + i, Whole{}) + piece, Whole{});
      store<kDoubles>(near + i, Vec<acc_t, kDoubles>{}, Whole{});
    }
  };
  for (int64_t run = begin; run < end; run += kRun) {
    for (int64_t block = 0; block < cols; block += kBlock) {
      for (int64_t row = run; row < min(run + kRun, end); ++row) {
        const int64_t offset = row * cols + block, count = min(min(cols - block, kBlock), numel - offset);
        int64_t i = 0;
        for (; i + L <= count; i += L) {
          const auto v = term(offset + i, block + i, Whole{});
          add(near_a + i, v.a);
          add(near_b + i, v.b);
        }
        if (i < count) {
          const auto v = term(offset + i, block + i, Part{count - i});
          add(near_a + i, first_lanes<L>(v.a, count - i));
          add(near_b + i, first_lanes<L>(v.b, count - i));
        }
      }
      flush(sum_a + block, near_a, min(cols - block, kBlock));
      flush(sum_b + block, near_b, min(cols - block, kBlock));
    }
  }
}

// Contiguous: one pair of sums, kDoubles lanes each, over `count` elements of a plane. term(i, lanes) -> Pair.
template <typename acc_t, int64_t L, typename Term>
FASTRES_INLINE void reduce_plane(int64_t count, double* sum_a, double* sum_b, Term term) {
  using V = Vec<acc_t, L>;
  auto a = load<double, kDoubles>(sum_a, Whole{});
  auto b = load<double, kDoubles>(sum_b, Whole{});
  const auto accumulate = [&](V group_a, V group_b) {
    for_doubles<acc_t, L>(group_a, [&](int64_t, auto piece) { a += piece; });
    for_doubles<acc_t, L>(group_b, [&](int64_t, auto piece) { b += piece; });
  };
  int64_t i = 0;
  for (; i + kGroup * L <= count; i += kGroup * L) {
    const Pair<V> v0 = term(i, Whole{}), v1 = term(i + L, Whole{}), v2 = term(i + 2 * L, Whole{}),
                  v3 = term(i + 3 * L, Whole{});
    accumulate((v0.a + v1.a) + (v2.a + v3.a), (v0.b + v1.b) + (v2.b + v3.b));
  }
  V rest_a{}, rest_b{};
  for (; i + L <= count; i += L) {
    const Pair<V> v = term(i, Whole{});
    rest_a += v.a;
    rest_b += v.b;
  }
  if (i < count) {
    const Pair<V> v = term(i, Part{count - i});
    rest_a += first_lanes<L>(v.a, count - i);
    rest_b += first_lanes<L>(v.b, count - i);
  }
  accumulate(rest_a, rest_b);
  store<kDoubles>(sum_a, a, Whole{});
  store<kDoubles>(sum_b, b, Whole{});
}

}  // namespace fastres::cpu::FASTRES_LEVEL
