// Bodies of the batch normalisation kernels; kAdd: with a residual, whose backward takes the ReLU's mask from the saved y.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "common/epilogue.h"
#include "cpu/bn_args.h"
#include "cpu/loops.h"

namespace fastres::cpu::FASTRES_LEVEL {

// Calls f(args, scalar type, is channels_last, is relu), the latter three as compile-time values. f takes args by value: no
// store can alias its own copy, so that pointers and sizes stay in registers.
template <typename F>
FASTRES_INLINE void with_traits(const BnArgs& args, F f) {
  with_dtype(args.dtype, [&](auto type) {
    with_bool(args.channels_last, [&](auto last) {
      with_bool(args.act == Act::kRelu, [&](auto is_relu) { f(args, type, last, is_relu); });
    });
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

// Sums term(offset, entry, lanes) -> Pair over the chunks [begin, end): `offset` into x, `entry` into the tables.
template <bool kChannelsLast, typename acc_t, typename Term>
FASTRES_INLINE void reduce_chunks(const BnArgs& args, int64_t begin, int64_t end, Term term) {
  constexpr int64_t L = kLanes<acc_t>;
  for (int64_t k = begin; k < end; ++k) {
    const Chunk<kChannelsLast> chunk(args, k);
    chunk.clear();
    if constexpr (kChannelsLast) {
      reduce_rows<acc_t, L>(chunk.row_begin, chunk.row_end, args.cols, args.numel, chunk.sum_a, chunk.sum_b, term);
    } else {
      chunk.for_each_plane([&](int64_t plane, int64_t c, double* sum_a, double* sum_b) {
        reduce_plane<acc_t, L>(args.cols, sum_a, sum_b, [&](int64_t i, auto lanes) {
          return term(plane * args.cols + i, c, lanes);
        });
      });
    }
  }
}

// Calls body(offset, entry, lanes) for the elements of rows [begin, end).
template <bool kChannelsLast, int64_t L, typename scalar_t, typename Body>
FASTRES_INLINE void for_each_row(const BnArgs& args, int64_t begin, int64_t end, const scalar_t* out, Body body) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * args.cols;
    const int64_t channel = row % args.channels;
    for_each<L>(min(args.cols, args.numel - offset), out + offset, args.stream, [&](int64_t i, auto lanes) {
      body(offset + i, kChannelsLast ? i : channel, lanes);
    });
  }
  if (args.stream) stream_fence();
}

template <bool kAdd>
FASTRES_INLINE void forward(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    constexpr bool kLast = last.value;
    const auto* x = static_cast<const scalar_t*>(args.x);
    const auto* residual = static_cast<const scalar_t*>(args.residual);
    const auto* mean = static_cast<const acc_t*>(args.mean);
    const auto* scale = static_cast<const acc_t*>(args.scale);
    const auto* bias = static_cast<const acc_t*>(args.bias);
    auto* y = static_cast<scalar_t*>(args.out);
    for_each_row<kLast, L>(args, begin, end, y, [&](int64_t offset, int64_t entry, auto lanes) {
      auto z = normalise(read<acc_t, L>(x + offset, lanes), channel_value<acc_t, L, kLast>(mean, entry),
                         channel_value<acc_t, L, kLast>(scale, entry), channel_value<acc_t, L, kLast>(bias, entry));
      if constexpr (kAdd) z += read<acc_t, L>(residual + offset, lanes);
      store<L>(y + offset, is_relu.value ? relu(z) : z, lanes);
    });
  });
}

// dz, the gradient behind the activation, of L elements; x_centred = x - mean.
template <bool kAdd, bool kRelu, bool kLast, int64_t L, typename scalar_t, typename Lanes>
FASTRES_INLINE auto load_dz(const BnArgs& args, int64_t offset, int64_t entry, Lanes lanes) {
  using acc_t = acc_of<scalar_t>;
  const auto grad_y = read<acc_t, L>(static_cast<const scalar_t*>(args.grad_y) + offset, lanes);
  if constexpr (!kRelu) {
    return grad_y;
  } else if constexpr (kAdd) {
    return relu_gradient(grad_y, read<acc_t, L>(static_cast<const scalar_t*>(args.y) + offset, lanes), acc_t{});
  } else {
    const auto z = normalise(load<acc_t, L>(static_cast<const scalar_t*>(args.x) + offset, lanes),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.mean), entry),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.scale), entry),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.bias), entry));
    return relu_gradient(grad_y, z, static_cast<acc_t>(kZeroUpTo<scalar_t>));
  }
}

// With a residual, dz is its gradient: it is written here, and the second pass reads it instead of grad_y and y.
template <bool kAdd>
FASTRES_INLINE void sums(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    constexpr bool kLast = last.value;
    const auto* x = static_cast<const scalar_t*>(args.x);
    const auto* mean = static_cast<const acc_t*>(args.mean);
    auto* grad_residual = static_cast<scalar_t*>(args.grad_residual);
    // Whole vectors of rows are aligned where the tensor is.
    const bool stream = kAdd && kLast && args.stream && reinterpret_cast<uintptr_t>(grad_residual) % kVectorBytes == 0;
    reduce_chunks<kLast, acc_t>(args, begin, end, [&](int64_t offset, int64_t entry, auto lanes) {
      const auto dz = load_dz<kAdd, is_relu.value, kLast, L, scalar_t>(args, offset, entry, lanes);
      if constexpr (kAdd) {
        if (is_whole(lanes) && stream) store<L>(grad_residual + offset, dz, Stream{});
        else store<L>(grad_residual + offset, dz, lanes);
      }
      const auto x_centred = read<acc_t, L>(x + offset, lanes) - channel_value<acc_t, L, kLast>(mean, entry);
      return Pair<Vec<acc_t, L>>{dz, dz * x_centred};
    });
    if (stream) stream_fence();
  });
}

// grad_x of L elements from their dz.
template <bool kTraining, bool kLast, int64_t L, typename scalar_t, typename V, typename Lanes>
FASTRES_INLINE void store_grad_x(const BnArgs& args, V dz, scalar_t* to, int64_t offset, int64_t entry, Lanes lanes) {
  using acc_t = acc_of<scalar_t>;
  const auto value = [&](const void* table) {
    return channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(table), entry);
  };
  if constexpr (kTraining) {
    const auto x = read<acc_t, L>(static_cast<const scalar_t*>(args.x) + offset, lanes);
    store<L>(to, normalise_grad(dz, x, value(args.mean), value(args.scale), value(args.mean_dz), value(args.slope)), lanes);
  } else {
    store<L>(to, dz * value(args.scale), lanes);
  }
}

template <bool kAdd>
FASTRES_INLINE void gradient(const BnArgs& shared, int64_t begin, int64_t end) {
  with_traits(shared, [&](BnArgs args, auto type, auto last, auto is_relu) {
    with_bool(args.training, [&](auto training) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value;
      auto* grad_x = static_cast<scalar_t*>(args.out);
      const auto* grad_residual = static_cast<const scalar_t*>(args.grad_residual);
      for_each_row<kLast, L>(args, begin, end, grad_x, [&](int64_t offset, int64_t entry, auto lanes) {
        Vec<acc_t, L> dz;
        if constexpr (kAdd) dz = read<acc_t, L>(grad_residual + offset, lanes);
        else dz = load_dz<kAdd, is_relu.value, kLast, L, scalar_t>(args, offset, entry, lanes);
        store_grad_x<training.value, kLast, L>(args, dz, grad_x + offset, offset, entry, lanes);
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
