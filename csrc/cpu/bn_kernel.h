// Bodies of the batch normalisation kernels; kAdd: with a residual, whose training saves the ReLU's mask for backward.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "common/epilogue.h"
#include "cpu/bn_args.h"
#include "cpu/loops.h"
#include "cpu/mask.h"

namespace fastres::cpu::FASTRES_LEVEL {

// Calls f(args, scalar type, is channels_last), the latter two as compile-time values. f takes args by value: no store can
// alias its own copy, so that pointers and sizes stay in registers.
template <typename F>
FASTRES_INLINE void with_layout(const BnArgs& args, F f) {
  with_dtype(args.dtype, [&](auto type) { with_bool(args.channels_last, [&](auto last) { f(args, type, last); }); });
}

// Calls f(args, scalar type, is channels_last, is relu), likewise.
template <typename F>
FASTRES_INLINE void with_traits(const BnArgs& args, F f) {
  with_layout(args, [&](const BnArgs& same, auto type, auto last) {
    with_bool(same.act == Act::kRelu, [&](auto is_relu) { f(same, type, last, is_relu); });
  });
}

// One chunk of a reduction: where its sums are, and what it covers.
template <bool kChannelsLast>
struct Chunk {
  const BnArgs& args;
  int64_t row_begin, row_end;  // channels last: rows of x; contiguous: images of the batch
  int64_t c_begin, c_end;      // contiguous: channels
  double *sum_a, *sum_b;

  Chunk(const BnArgs& args, int64_t chunk) : args(args) {
    const int64_t slice = kChannelsLast ? chunk : chunk % args.slices;
    const int64_t rows = kChannelsLast ? args.rows : args.rows / args.channels;
    row_begin = rows * slice / args.slices;
    row_end = rows * (slice + 1) / args.slices;
    c_begin = kChannelsLast ? 0 : chunk / args.slices * args.block;
    c_end = min(c_begin + args.block, args.channels);
    sum_a = args.partial + slice * 2 * args.width;
    sum_b = sum_a + args.width;
  }

  void clear() const {
    const int64_t first = kChannelsLast ? 0 : c_begin * kSumLanes;
    const int64_t count = kChannelsLast ? args.width : (c_end - c_begin) * kSumLanes;
    memset(sum_a + first, 0, count * sizeof(double));
    memset(sum_b + first, 0, count * sizeof(double));
  }

  // f(plane, channel, the channel's sums), for contiguous chunks.
  template <typename F>
  void for_each_plane(F f) const {
    for (int64_t n = row_begin; n < row_end; ++n)
      for (int64_t c = c_begin; c < c_end; ++c) f(n * args.channels + c, c, sum_a + c * kSumLanes, sum_b + c * kSumLanes);
  }
};

// Sums term(entry)(offset, lanes) -> Pair over the chunks [begin, end): `entry` into the tables, `offset` into x. kNearRows:
// how many rows at a time where the tensors may be in the caches.
template <bool kChannelsLast, int64_t kNearRows, typename acc_t, typename Term>
FASTRES_INLINE void reduce_chunks(const BnArgs& args, int64_t begin, int64_t end, Term term) {
  constexpr int64_t L = kLanes<acc_t>;
  for (int64_t k = begin; k < end; ++k) {
    const Chunk<kChannelsLast> chunk(args, k);
    chunk.clear();
    if constexpr (kChannelsLast) {
      with_bool(kNearRows > 1 && !args.stream, [&](auto near) {
        reduce_rows<acc_t, L, near.value ? kNearRows : 1>(chunk.row_begin, chunk.row_end, args.cols, args.numel, chunk.sum_a,
                                                          chunk.sum_b, term);
      });
    } else {
      chunk.for_each_plane([&](int64_t plane, int64_t c, double* sum_a, double* sum_b) {
        const auto at = term(c);
        reduce_plane<acc_t, L>(args.cols, sum_a, sum_b, [&](int64_t i, auto lanes) { return at(plane * args.cols + i, lanes); });
      });
    }
  }
}

// Calls body(entry)(offset, lanes) for the elements of rows [begin, end), in memory order; channels last, whole vectors
// start at multiples of L.
template <bool kChannelsLast, int64_t L, typename scalar_t, typename Body>
FASTRES_INLINE void for_each_row(const BnArgs& args, int64_t begin, int64_t end, const scalar_t* out, Body body) {
  const bool aligned = reinterpret_cast<uintptr_t>(out) % (L * sizeof(scalar_t)) == 0;
  const bool stream = args.stream && (aligned || !kChannelsLast);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * args.cols;
    const int64_t channel = row % args.channels;
    for_each<L>(min(args.cols, args.numel - offset), out + offset, stream, [&](int64_t i, auto lanes) {
      body(kChannelsLast ? i : channel)(offset + i, lanes);
    });
  }
  if (stream) stream_fence();
}

// What the tables hold for L neighbouring elements.
template <typename V>
struct Affine {
  V mean, scale, bias;
  FASTRES_INLINE V operator()(V x) const { return normalise(x, mean, scale, bias); }
};
template <typename acc_t, int64_t L, bool kLast>
FASTRES_INLINE auto load_affine(const BnArgs& args, int64_t entry) {
  const auto value = [&](const void* table) {
    return channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(table), entry);
  };
  return Affine<Vec<acc_t, L>>{value(args.mean), value(args.scale), value(args.bias)};
}

// Stores act(z) and, where there is a mask, its bits: a z that rounds to zero passes no gradient.
template <int64_t L, bool kLast, bool kRelu, bool kMask, typename scalar_t, typename V, typename Lanes>
FASTRES_INLINE void store_activated(const BnArgs& args, scalar_t* y, int64_t offset, V z, Lanes lanes) {
  using acc_t = acc_of<scalar_t>;
  if constexpr (kMask) {
    const uint32_t bits = bits_above<L, acc_t>(z, static_cast<acc_t>(kZeroUpTo<scalar_t>));
    store_bits<L, kLast && kIsWhole<Lanes>>(args.mask, offset, count_of<L>(lanes), bits);
  }
  store<L>(y + offset, kRelu ? relu(z) : z, lanes);
}

// Calls f(whether a mask is to be written), as a compile-time value.
template <bool kPossible, typename F>
FASTRES_INLINE void with_mask(const BnArgs& args, F f) {
  if constexpr (kPossible) with_bool(args.mask != nullptr, f);
  else f(Bool<false>{});
}

template <bool kAdd>
FASTRES_INLINE void forward(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    with_mask<kAdd && is_relu.value>(args, [&](auto has_mask) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value, kRelu = is_relu.value, kMask = has_mask.value;
      const auto* x = static_cast<const scalar_t*>(args.x);
      const auto* residual = static_cast<const scalar_t*>(args.residual);
      auto* y = static_cast<scalar_t*>(args.out);
      for_each_row<kLast, L>(args, begin, end, y, [&](int64_t entry) {
        return [&, affine = load_affine<acc_t, L, kLast>(args, entry)](int64_t offset, auto lanes) {
          auto z = affine(read<acc_t, L>(x + offset, lanes));
          if constexpr (kAdd) z += read<acc_t, L>(residual + offset, lanes);
          store_activated<L, kLast, kRelu, kMask>(args, y, offset, z, lanes);
        };
      });
    });
  });
}

// dz, the gradient behind the activation, of L elements of x, which lie at `offset`. kTwo: the gradient comes in two parts.
template <bool kAdd, bool kTwo, bool kRelu, bool kLast, int64_t L, typename scalar_t, typename V, typename Lanes>
FASTRES_INLINE V load_dz(const BnArgs& args, const Affine<V>& affine, V x, int64_t offset, Lanes lanes) {
  using acc_t = acc_of<scalar_t>;
  auto grad_y = read<acc_t, L>(static_cast<const scalar_t*>(args.grad_y) + offset, lanes);
  if constexpr (kTwo) grad_y += read<acc_t, L>(static_cast<const scalar_t*>(args.grad_y2) + offset, lanes);
  if constexpr (!kRelu) return grad_y;
  else if constexpr (!kAdd) return relu_gradient(grad_y, affine(x), static_cast<acc_t>(kZeroUpTo<scalar_t>));
  else return where_bits<L, acc_t>(load_bits<L, kLast && kIsWhole<Lanes>>(args.mask, offset, count_of<L>(lanes)), grad_y);
}

// With a residual, dz is its gradient: it is written here, and the second pass reads it instead of grad_y and the mask.
template <bool kAdd, bool kTwo>
FASTRES_INLINE void sums(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    constexpr bool kLast = last.value;
    const auto* from_x = static_cast<const scalar_t*>(args.x);
    auto* grad_residual = static_cast<scalar_t*>(args.grad_residual);
    // Whole vectors of rows are aligned where the tensor is.
    const bool stream = kAdd && kLast && args.stream && reinterpret_cast<uintptr_t>(grad_residual) % kVectorBytes == 0;
    reduce_chunks<kLast, kAdd ? 1 : 4, acc_t>(args, begin, end, [&](int64_t entry) {
      return [&, affine = load_affine<acc_t, L, kLast>(args, entry)](int64_t offset, auto lanes) {
        const auto x = read<acc_t, L>(from_x + offset, lanes);
        const auto dz = load_dz<kAdd, kTwo, is_relu.value, kLast, L, scalar_t>(args, affine, x, offset, lanes);
        if constexpr (kAdd) {
          if (kIsWhole<decltype(lanes)> && stream) store<L>(grad_residual + offset, dz, Stream{});
          else store<L>(grad_residual + offset, dz, lanes);
        }
        return Pair<Vec<acc_t, L>>{dz, dz * (x - affine.mean)};
      };
    });
    if (stream) stream_fence();
  });
}

// The gradient of x behind the sums, for L neighbouring elements.
template <bool kTraining, typename acc_t, int64_t L, bool kLast>
FASTRES_INLINE auto load_slope(const BnArgs& args, int64_t entry) {
  const auto affine = load_affine<acc_t, L, kLast>(args, entry);
  if constexpr (kTraining) {
    const auto mean_dz = channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.mean_dz), entry);
    const auto slope = channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.slope), entry);
    return [=](Vec<acc_t, L> dz, Vec<acc_t, L> x) {
      return normalise_grad(dz, x, affine.mean, affine.scale, mean_dz, slope);
    };
  } else {
    return [=](Vec<acc_t, L> dz, Vec<acc_t, L>) { return dz * affine.scale; };
  }
}

FASTRES_INLINE void gradient(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    with_bool(args.training, [&](auto training) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value, kRelu = is_relu.value;
      auto* grad_x = static_cast<scalar_t*>(args.out);
      const auto* from_x = static_cast<const scalar_t*>(args.x);
      for_each_row<kLast, L>(args, begin, end, grad_x, [&](int64_t entry) {
        return [&, affine = load_affine<acc_t, L, kLast>(args, entry),
                slope = load_slope<training.value, acc_t, L, kLast>(args, entry)](int64_t offset, auto lanes) {
          Vec<acc_t, L> x{};
          if constexpr (training.value || kRelu) x = read<acc_t, L>(from_x + offset, lanes);
          const auto dz = load_dz<false, false, kRelu, kLast, L, scalar_t>(args, affine, x, offset, lanes);
          store<L>(grad_x + offset, slope(dz, x), lanes);
        };
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
