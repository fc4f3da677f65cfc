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

// ---- reductions: two sums per channel, in double ---------------------------------------------------------------------------

template <typename V>
struct Pair {
  V a, b;
};

template <int64_t L, typename V>
FASTRES_INLINE Pair<V> first_lanes(Pair<V> v, int64_t n) {
  for (int64_t lane = n; lane < L; ++lane) v.a[lane] = v.b[lane] = 0;
  return v;
}

template <int64_t L, typename V>
FASTRES_INLINE void add_to(Pair<Vec<double, L>>& sum, Pair<V> v) {
  sum.a += __builtin_convertvector(v.a, Vec<double, L>);
  sum.b += __builtin_convertvector(v.b, Vec<double, L>);
}

// Four terms are added in their own type, the groups of four in double.
constexpr int64_t kGroup = 4;

// Channels last: `cols` accumulators for rows [begin, end) of a tensor that ends after `numel` elements, maybe inside a row.
// Walks rows in memory order, kGroup at a time; accumulators stay in the near caches. term(offset, col, lanes) -> Pair.
template <int64_t L, typename Term>
FASTRES_INLINE void reduce_rows(int64_t begin, int64_t end, int64_t cols, int64_t numel, double* sum_a, double* sum_b,
                                Term term) {
  const auto accumulate = [&](int64_t col, auto v) {
    Pair<Vec<double, L>> sum{load<double, L>(sum_a + col, Whole{}), load<double, L>(sum_b + col, Whole{})};
    add_to<L>(sum, v);
    store<L>(sum_a + col, sum.a, Whole{});
    store<L>(sum_b + col, sum.b, Whole{});
  };
  const int64_t whole_end = min(end, numel / cols);
  int64_t row = begin;
  for (; row + kGroup <= whole_end; row += kGroup) {
    for (int64_t col = 0; col < cols; col += L) {
      auto v = term(row * cols + col, col, Whole{});
      for (int64_t k = 1; k < kGroup; ++k) {
        const auto next = term((row + k) * cols + col, col, Whole{});
        v.a += next.a;
        v.b += next.b;
      }
      accumulate(col, v);
    }
  }
  for (; row < end; ++row) {
    const int64_t count = min(cols, numel - row * cols);
    int64_t col = 0;
    for (; col + L <= count; col += L) accumulate(col, term(row * cols + col, col, Whole{}));
    if (col < count) accumulate(col, first_lanes<L>(term(row * cols + col, col, Part{count - col}), count - col));
  }
}

// Contiguous: one accumulator pair, L lanes wide, for `count` elements of one plane. term(i, lanes) -> Pair.
template <int64_t L, typename Term>
FASTRES_INLINE void reduce_plane(int64_t count, double* sum_a, double* sum_b, Term term) {
  Pair<Vec<double, L>> sum{load<double, L>(sum_a, Whole{}), load<double, L>(sum_b, Whole{})};
  int64_t i = 0;
  for (; i + kGroup * L <= count; i += kGroup * L) {
    auto v = term(i, Whole{});
    for (int64_t k = 1; k < kGroup; ++k) {
      const auto next = term(i + k * L, Whole{});
      v.a += next.a;
      v.b += next.b;
    }
    add_to<L>(sum, v);
  }
  for (; i + L <= count; i += L) add_to<L>(sum, term(i, Whole{}));
  if (i < count) add_to<L>(sum, first_lanes<L>(term(i, Part{count - i}), count - i));
  store<L>(sum_a, sum.a, Whole{});
  store<L>(sum_b, sum.b, Whole{});
}

}  // namespace fastres::cpu::FASTRES_LEVEL
