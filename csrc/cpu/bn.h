// What the bindings of bn_act, bn_add_act and bn_act_maxpool share: checks, statistics, tables, parameter gradients.
#pragma once

#include <cmath>
#include <numeric>

#include "cpu/bn_args.h"
#include "cpu/channels.h"

namespace fastres::cpu {

// Passes whose tensors together take at least this much write their outputs past the caches, which could not hold them until they
// are read. In the backward of bn_add_act, 32x2048x7x7 in bf16 then takes 0.84 times as long, 32x256x14x14 in fp32 0.92 times; in
// that of bn_act, which has fewer tensors, they would take 1.1 times as long (AMD EPYC, Zen 4, 2026-11-25).
constexpr int64_t kCacheBytes = int64_t{24} << 20;

// One call: the checked problem as kernels see it, and its per-channel values. Stages fill it in order.
struct BnCall {
  const char* op;
  const Tensor& x;
  Format format;
  BnArgs args{};
  double count = 0;  // values per channel
  Channels weight, bias, mean, invstd;
  Channels origin;  // what kernels subtract from x
  Scratch scratch;

  // outputs: activations that it writes. pooled: y has other sizes than x, so that the two layouts of 1x1 planes do not
  // coincide.
  BnCall(const char* op, std::initializer_list<Named> activations, const std::string& act, int64_t outputs = 1,
         bool pooled = false)
      : op(op), x(activations.begin()->tensor) {
    for (const auto& [param, tensor] : activations) check_cpu(op, param, tensor);
    format = check_activations(op, activations, true);
    args.dtype = dtype_of(x);
    args.act = act_of(op, act);
    args.numel = x.numel();
    args.channels = x.size(1);
    count = static_cast<double>(args.numel / args.channels);  // NOLINT(bugprone-integer-division): without remainder
    args.x = x.data_ptr();
    const int64_t tensors = static_cast<int64_t>(activations.size()) + outputs;
    args.stream = args.numel * element_size(args.dtype) * tensors >= kCacheBytes;
    const int64_t plane = x.size(2) * x.size(3);
    args.channels_last = format == Format::channels_last || (plane == 1 && !pooled);
    if (args.channels_last) {  // whole vectors, and enough of them to hide the cost of a row
      const int64_t step = args.channels * kColsMultiple / std::gcd(args.channels, kColsMultiple);
      args.cols = (64 + step - 1) / step * step;
    } else {
      args.cols = plane;
    }
    args.rows = (args.numel + args.cols - 1) / args.cols;
  }

  void read_affine(const OptionalTensor& w, const OptionalTensor& b) {
    weight = w ? read_channels(op, "weight", *w, x) : Channels(args.channels, 1.0);
    bias = b ? read_channels(op, "bias", *b, x) : Channels(args.channels, 0.0);
  }

  void read_statistics(const Tensor& m, const Tensor& v, double eps) {
    mean = read_channels(op, "mean", m, x);
    invstd = read_channels(op, "var", v, x);
    for (double& value : invstd) value = 1.0 / std::sqrt(value + eps);
  }

  // A table as kernels read it, of value(c) in the accumulate type.
  template <typename F>
  const void* table(F value) {
    return args.dtype == DType::kFloat64 ? table_of<double>(value) : table_of<float>(value);
  }

  // An infinite scale multiplies x and the mean separately, as in torch, so that infinities that cancel give NaN.
  void fill_tables() {
    Channels scale(args.channels), shift = bias;
    origin = mean;
    for (int64_t c = 0; c < args.channels; ++c) {
      scale[c] = weight[c] * invstd[c];
      if (std::isinf(args.dtype == DType::kFloat64 ? scale[c] : static_cast<float>(scale[c]))) {
        shift[c] -= mean[c] * (scale[c] < 0 ? -INFINITY : INFINITY);
        origin[c] = 0;
      }
    }
    args.mean = table([&](int64_t c) { return origin[c]; });
    args.scale = table([&](int64_t c) { return scale[c]; });
    args.bias = table([&](int64_t c) { return shift[c]; });
  }

  // Splits the problem into chunks and runs `kernel` on them; the result is args.sums.
  template <typename Kernel>
  void reduce(Kernel kernel) {
    if (!args.partial) plan_chunks();
    parallel_for(0, args.chunks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    const int64_t parts = args.channels_last ? args.chunks : args.slices;
    const int64_t grain = std::max<int64_t>(1, kGrain * args.channels / (parts * args.width));
    parallel_for(0, args.channels, grain, [&](int64_t begin, int64_t end) { bn_merge(args, begin, end); });
  }

  // A thread writes whole bytes of the mask: rows of channels_last are whole vectors; of contiguous planes it takes eight.
  template <typename Kernel>
  void run_rows(Kernel kernel) {
    const int64_t group = args.channels_last ? 1 : 8, groups = (args.rows + group - 1) / group;
    const int64_t grain = std::max<int64_t>(1, kGrain / (args.cols * group));
    parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
      kernel(args, begin * group, std::min(end * group, args.rows));
    });
  }

  // A mask for the ReLU to write; empty without a ReLU.
  Tensor empty_mask() {
    Tensor mask = empty_vector(args.act == Act::kRelu ? (args.numel + 7) / 8 : 0, ScalarType::Byte, x);
    args.mask = static_cast<uint8_t*>(mask.data_ptr());
    return mask;
  }

  void read_mask(const Tensor& mask) {
    check_cpu(op, "mask", mask);
    check_mask(op, mask, args.act == Act::kRelu ? args.numel : 0);
    args.mask = static_cast<uint8_t*>(mask.data_ptr());
  }

 private:
  template <typename acc_t, typename F>
  const void* table_of(F value) {
    const int64_t entries = args.channels_last ? args.cols : args.channels;
    acc_t* out = scratch.take<acc_t>(entries + kColsMultiple);
    for (int64_t c = 0; c < args.channels; ++c) out[c] = static_cast<acc_t>(value(c));
    for (int64_t i = args.channels; i < entries; ++i) out[i] = out[i - args.channels];
    std::fill_n(out + entries, kColsMultiple, acc_t{});
    return out;
  }

  void plan_chunks() {
    constexpr int64_t kMaxChunks = 128;
    if (args.channels_last) {
      const int64_t smallest = std::max(kGrain, 128 * args.cols);  // many rows per set of sums
      args.chunks = std::clamp<int64_t>(args.numel / smallest, 1, kMaxChunks);
      args.slices = args.chunks;
      args.width = args.cols;
    } else {
      args.block = std::min(args.channels, (4096 + args.cols - 1) / args.cols);  // long runs of memory
      const int64_t blocks = (args.channels + args.block - 1) / args.block;
      const int64_t wanted = std::clamp<int64_t>(args.numel / kGrain, 1, kMaxChunks);
      args.slices = std::clamp<int64_t>(wanted / blocks, 1, x.size(0));
      args.chunks = blocks * args.slices;
      args.width = args.channels * kSumLanes;
    }
    const int64_t parts = args.channels_last ? args.chunks : args.slices;
    args.partial = scratch.take<double>(parts * 2 * args.width);
    args.sums = scratch.take<double>(2 * args.channels);
  }
};

// ---- training: statistics of x, and the gradients that depend on them -----------------------------------------

struct Statistics {
  Tensor mean, var;
};

// The mean of a few values of each channel. A constant channel gives its constant; an outlier v among them moves it only by v/8,
// so that the loss of digits in shifted sums, ((shift - mean) / std)^2, stays below count/64 whatever the data.
inline Channels sample_channels(const BnCall& call) {
  const BnArgs& args = call.args;
  const int64_t count = args.numel / args.channels, samples = std::min<int64_t>(8, args.channels_last ? count : args.cols);
  const int64_t step = args.channels_last ? count / samples * args.channels : 1;
  const int64_t stride = args.channels_last ? 1 : args.cols;
  Channels mean(args.channels, 0.0);
  with_data(call.x.data_ptr(), call.x.scalar_type(), [&](const auto* x) {
    for (int64_t k = 0; k < samples; ++k)
      for (int64_t c = 0; c < args.channels; ++c) mean[c] += static_cast<double>(x[c * stride + k * step]);
  });
  for (double& value : mean) value = std::isfinite(value) ? value / static_cast<double>(samples) : 0.0;
  return mean;
}

// Biased statistics of x, rounded as they are returned: backward will see the same values.
inline Statistics batch_statistics(BnCall& call, double eps) {
  BnArgs& args = call.args;
  FASTRES_CHECK(call.count > 1, call.op, "x", "of more than 1 value per channel", show(call.x.sizes()));
  Channels shift = sample_channels(call), var(args.channels);
  // float64 sums a second time about the mean, as exact as two passes.
  const int passes = args.dtype == DType::kFloat64 ? 2 : 1;
  for (int pass = 0; pass < passes; ++pass) {
    if (args.dtype != DType::kFloat64)
      for (double& value : shift) value = static_cast<float>(value);  // as the kernel reads it
    args.shift = call.table([&](int64_t c) { return shift[c]; });
    call.reduce(bn_statistics);
    for (int64_t c = 0; c < args.channels; ++c) {
      const double off = args.sums[c] / call.count;
      const double second = args.sums[args.channels + c] / call.count - off * off;
      var[c] = second < 0 ? 0 : second;
      shift[c] += off;
    }
  }
  const ScalarType dtype = accumulate_type(call.x);
  Statistics out{write_channels(shift, dtype, call.x), write_channels(var, dtype, call.x)};
  call.read_statistics(out.mean, out.var, eps);
  return out;
}

struct ParameterGradients {
  Tensor weight, bias;
};

// From the sums of dz and dz * (x - origin): the gradients of weight and bias, and the tables that grad_x needs.
inline ParameterGradients parameter_gradients(BnCall& call, const Tensor& mean, const OptionalTensor& weight,
                                              const OptionalTensor& bias) {
  BnArgs& args = call.args;
  const double *sum_dz = args.sums, *sum_dz_x = args.sums + args.channels;
  Channels grad_weight(args.channels), grad_bias(sum_dz, sum_dz + args.channels), mean_dz(args.channels), slope(args.channels);
  for (int64_t c = 0; c < args.channels; ++c) {
    const double moved = call.origin[c] == call.mean[c] ? 0 : call.mean[c];  // an infinite scale
    grad_weight[c] = call.invstd[c] * (moved == 0 ? sum_dz_x[c] : sum_dz_x[c] - moved * sum_dz[c]);
    slope[c] = call.invstd[c] * grad_weight[c] / call.count;
    mean_dz[c] = sum_dz[c] / call.count;
    if (moved != 0) mean_dz[c] -= moved * slope[c];
  }
  if (args.training) {
    args.mean_dz = call.table([&](int64_t c) { return mean_dz[c]; });
    args.slope = call.table([&](int64_t c) { return slope[c]; });
  }
  const ScalarType weight_dtype = (weight ? *weight : mean).scalar_type();
  const ScalarType bias_dtype = bias ? bias->scalar_type() : weight_dtype;
  return {write_channels(grad_weight, weight_dtype, call.x), write_channels(grad_bias, bias_dtype, call.x)};
}

}  // namespace fastres::cpu
