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
// a row. term(col)(offset, lanes) -> Pair. The sums of kRun rows grow in the near cache, kBlock columns at a time, and join
// those in double; kRows rows are added before they meet them. kRows is 1, memory in order, for what does not come from the
// caches: of several rows at a time the hardware does not foresee the next line, and statistics at 32x512x28x28 in bf16 take
// 1.3 times as long. In the caches statistics at 32x512x7x7, four rows at a time, take 0.6 of the time in fp32 and 0.8 in bf16
// (AMD EPYC, Zen 4, 2026-11-25).
constexpr int64_t kRun = 32, kBlock = 2048;

template <typename acc_t, int64_t L, int64_t kRows, typename Term>
FASTRES_INLINE void reduce_rows(int64_t begin, int64_t end, int64_t cols, int64_t numel, double* sum_a, double* sum_b,
                                Term term) {
  static_assert(kRows == 1 || kRows == 4);
  // L sums of a beside their L sums of b: apart by whole pages, one's store would seem to be what the other loads.
  alignas(kVectorBytes) acc_t near[2 * kBlock];
  const auto grow = [](acc_t* sums, auto v) { store<L>(sums, load<acc_t, L>(sums, Whole{}) + v, Whole{}); };
  const auto add = [&](int64_t i, auto v) {
    grow(near + 2 * i, v.a);
    grow(near + 2 * i + L, v.b);
  };
  const auto flush = [&](double* sum, const acc_t* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kDoubles) {
      const auto piece = to_double<kDoubles>(load<acc_t, kDoubles>(from + 2 * i - i % L, Whole{}));
      store<kDoubles>(sum + i, load<double, kDoubles>(sum + i, Whole{}) + piece, Whole{});
    }
  };
  for (int64_t run = begin; run < end; run += kRun) {
    const int64_t run_end = min(run + kRun, end), whole_end = min(run_end, numel / cols);
    for (int64_t block = 0; block < cols; block += kBlock) {
      const int64_t width = min(cols - block, kBlock);
      memset(near, 0, 2 * width * sizeof(acc_t));
      int64_t row = run;
      for (; row + kRows <= whole_end; row += kRows) {
        for (int64_t i = 0; i < width; i += L) {
          const auto at = term(block + i);
          const int64_t offset = row * cols + block + i;
          auto v = at(offset, Whole{});
          if constexpr (kRows == 4) {
            const auto v1 = at(offset + cols, Whole{}), v2 = at(offset + 2 * cols, Whole{}), v3 = at(offset + 3 * cols, Whole{});
            v = {(v.a + v1.a) + (v2.a + v3.a), (v.b + v1.b) + (v2.b + v3.b)};
          }
          add(i, v);
        }
      }
      for (; row < run_end; ++row) {  // the rest of a group, the rest of a row
        const int64_t offset = row * cols + block, count = min(width, numel - offset);
        for (int64_t i = 0; i < count; i += L) {
          const Part part{min(L, count - i)};
          const auto v = part.n == L ? term(block + i)(offset + i, Whole{}) : term(block + i)(offset + i, part);
          add(i, Pair{first_lanes<L>(v.a, part.n), first_lanes<L>(v.b, part.n)});
        }
      }
      flush(sum_a + block, near, width);
      flush(sum_b + block, near + L, width);
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
