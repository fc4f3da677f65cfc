// Bodies of the batch normalisation kernels; kAdd: with a residual, whose backward takes the ReLU's mask from the saved y.
// Included by *_kernel.cpp only; everything lives in the namespace of the level it is compiled for.
#pragma once

#include "common/epilogue.h"
#include "cpu/bn_args.h"
#include "cpu/loops.h"

namespace fastres::cpu::FASTRES_LEVEL {

// Calls f(scalar type, is channels_last, is relu) with the three as compile-time values.
template <typename F>
FASTRES_INLINE void with_traits(const BnArgs& args, F f) {
  with_dtype(args.dtype, [&](auto type) {
    with_bool(args.channels_last, [&](auto last) {
      with_bool(args.act == Act::kRelu, [&](auto is_relu) { f(type, last, is_relu); });
    });
  });
}

// Sums term(offset, entry, lanes) -> Pair over the chunks [begin, end): `offset` into x, `entry` into the tables.
template <bool kChannelsLast, int64_t L, typename Term>
FASTRES_INLINE void reduce_chunks(const BnArgs& args, int64_t begin, int64_t end, Term term) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t slice = kChannelsLast ? chunk : chunk % args.slices;
    double* sum_a = args.partial + slice * 2 * args.width;
    double* sum_b = sum_a + args.width;
    if constexpr (kChannelsLast) {
      memset(sum_a, 0, 2 * args.width * sizeof(double));
      reduce_rows<L>(args.rows * chunk / args.chunks, args.rows * (chunk + 1) / args.chunks, args.cols, args.numel, sum_a,
                     sum_b, term);
    } else {
      const int64_t c_begin = chunk / args.slices * args.block;
      const int64_t c_end = min(c_begin + args.block, args.channels);
      const int64_t batch = args.rows / args.channels;
      memset(sum_a + c_begin * kSumLanes, 0, (c_end - c_begin) * kSumLanes * sizeof(double));
      memset(sum_b + c_begin * kSumLanes, 0, (c_end - c_begin) * kSumLanes * sizeof(double));
      for (int64_t n = batch * slice / args.slices; n < batch * (slice + 1) / args.slices; ++n) {
        for (int64_t c = c_begin; c < c_end; ++c) {
          const int64_t offset = (n * args.channels + c) * args.cols;
          reduce_plane<L>(args.cols, sum_a + c * kSumLanes, sum_b + c * kSumLanes,
                          [&](int64_t i, auto lanes) { return term(offset + i, c, lanes); });
        }
      }
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
FASTRES_INLINE void forward(const BnArgs& args, int64_t begin, int64_t end) {
  with_traits(args, [&](auto type, auto last, auto is_relu) {
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
      auto z = normalise(load<acc_t, L>(x + offset, lanes), channel_value<acc_t, L, kLast>(mean, entry),
                         channel_value<acc_t, L, kLast>(scale, entry), channel_value<acc_t, L, kLast>(bias, entry));
      if constexpr (kAdd) z += load<acc_t, L>(residual + offset, lanes);
      store<L>(y + offset, is_relu.value ? relu(z) : z, lanes);
    });
  });
}

// dz, the gradient behind the activation, of L elements; x_centred = x - mean.
template <bool kAdd, bool kRelu, bool kLast, int64_t L, typename scalar_t, typename Lanes>
FASTRES_INLINE auto load_dz(const BnArgs& args, int64_t offset, int64_t entry, Lanes lanes) {
  using acc_t = acc_of<scalar_t>;
  const auto grad_y = load<acc_t, L>(static_cast<const scalar_t*>(args.grad_y) + offset, lanes);
  if constexpr (!kRelu) {
    return grad_y;
  } else if constexpr (kAdd) {
    return relu_gradient(grad_y, load<acc_t, L>(static_cast<const scalar_t*>(args.y) + offset, lanes), acc_t{});
  } else {
    const auto z = normalise(load<acc_t, L>(static_cast<const scalar_t*>(args.x) + offset, lanes),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.mean), entry),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.scale), entry),
                             channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(args.bias), entry));
    return relu_gradient(grad_y, z, static_cast<acc_t>(kZeroUpTo<scalar_t>));
  }
}

template <bool kAdd>
FASTRES_INLINE void sums(const BnArgs& args, int64_t begin, int64_t end) {
  with_traits(args, [&](auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<double>;
    constexpr bool kLast = last.value;
    const auto* x = static_cast<const scalar_t*>(args.x);
    const auto* mean = static_cast<const acc_t*>(args.mean);
    reduce_chunks<kLast, L>(args, begin, end, [&](int64_t offset, int64_t entry, auto lanes) {
      const auto dz = load_dz<kAdd, is_relu.value, kLast, L, scalar_t>(args, offset, entry, lanes);
      const auto x_centred = load<acc_t, L>(x + offset, lanes) - channel_value<acc_t, L, kLast>(mean, entry);
      return Pair<Vec<acc_t, L>>{dz, dz * x_centred};
    });
  });
}

template <bool kAdd>
FASTRES_INLINE void gradient(const BnArgs& args, int64_t begin, int64_t end) {
  with_traits(args, [&](auto type, auto last, auto is_relu) {
    with_bool(args.training, [&](auto training) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value;
      const auto* x = static_cast<const scalar_t*>(args.x);
      const auto* mean = static_cast<const acc_t*>(args.mean);
      const auto* scale = static_cast<const acc_t*>(args.scale);
      const auto* mean_dz = static_cast<const acc_t*>(args.mean_dz);
      const auto* slope = static_cast<const acc_t*>(args.slope);
      auto* grad_x = static_cast<scalar_t*>(args.out);
      auto* grad_residual = static_cast<scalar_t*>(args.grad_residual);
      for_each_row<kLast, L>(args, begin, end, grad_x, [&](int64_t offset, int64_t entry, auto lanes) {
        const auto dz = load_dz<kAdd, is_relu.value, kLast, L, scalar_t>(args, offset, entry, lanes);
        if constexpr (kAdd) store<L>(grad_residual + offset, dz, lanes);
        const auto scale_c = channel_value<acc_t, L, kLast>(scale, entry);
        if constexpr (training.value) {
          store<L>(grad_x + offset,
                   normalise_grad(dz, load<acc_t, L>(x + offset, lanes), channel_value<acc_t, L, kLast>(mean, entry), scale_c,
                                  channel_value<acc_t, L, kLast>(mean_dz, entry),
                                  channel_value<acc_t, L, kLast>(slope, entry)),
                   lanes);
        } else {
          store<L>(grad_x + offset, dz * scale_c, lanes);
        }
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
