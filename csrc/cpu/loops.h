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

// kGroup terms are added in their own type, the groups in double: as exact as double for all practical purposes, and most
// of the work is done in full float vectors.
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
// a row. Walks rows in memory order, kGroup at a time; the sums stay in the near caches. term(offset, col, lanes) -> Pair.
template <typename acc_t, int64_t L, typename Term>
FASTRES_INLINE void reduce_rows(int64_t begin, int64_t end, int64_t cols, int64_t numel, double* sum_a, double* sum_b,
                                Term term) {
  const auto accumulate = [&](int64_t col, auto v) {
    const auto add = [&](double* sum, auto piece) {
      store<kDoubles>(sum, load<double, kDoubles>(sum, Whole{}) + piece, Whole{});
    };
    for_doubles<acc_t, L>(v.a, [&](int64_t i, auto piece) { add(sum_a + col + i, piece); });
    for_doubles<acc_t, L>(v.b, [&](int64_t i, auto piece) { add(sum_b + col + i, piece); });
  };
  const int64_t whole_end = min(end, numel / cols);
  int64_t row = begin;
  for (; row + kGroup <= whole_end; row += kGroup) {
    for (int64_t col = 0; col < cols; col += L) {
      const int64_t offset = row * cols + col;
      const auto v0 = term(offset, col, Whole{}), v1 = term(offset + cols, col, Whole{}),
                 v2 = term(offset + 2 * cols, col, Whole{}), v3 = term(offset + 3 * cols, col, Whole{});
      accumulate(col, Pair{(v0.a + v1.a) + (v2.a + v3.a), (v0.b + v1.b) + (v2.b + v3.b)});
    }
  }
  for (; row < end; ++row) {
    const int64_t count = min(cols, numel - row * cols);
    int64_t col = 0;
    for (; col + L <= count; col += L) accumulate(col, term(row * cols + col, col, Whole{}));
    if (col < count) {
      const auto v = term(row * cols + col, col, Part{count - col});
      accumulate(col, Pair{first_lanes<L>(v.a, count - col), first_lanes<L>(v.b, count - col)});
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
