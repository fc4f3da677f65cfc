// What defines a convolution in training besides its tensors: checks, and where the pixels that taps meet lie.
#pragma once

#include <algorithm>
#include <array>

#include "cpu/conv.h"
#include "cpu/host.h"

namespace fastres::cpu {

using Ints = std::vector<int64_t>;
using Shape = std::array<int64_t, 4>;

struct ConvWindow {
  Ints kernel, stride, padding, dilation;
};

inline Shape shape_of(const Tensor& t) { return {t.size(0), t.size(1), t.size(2), t.size(3)}; }

// The shape of the output for x of a shape and so many output channels.
inline Shape output_shape(const char* op, const ConvWindow& window, const Shape& x, int64_t channels) {
  const auto check = [&](const char* param, const Ints& pair, int64_t least) {
    FASTRES_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) < 1 << 20, op, param,
                  "two numbers from " << least, show({pair.data(), pair.size()}));
  };
  check("kernel", window.kernel, 1);
  check("stride", window.stride, 1);
  check("padding", window.padding, 0);
  check("dilation", window.dilation, 1);
  Shape y{x[0], channels};
  for (int i = 2; i < 4; ++i) {
    const int64_t room = x[i] + 2 * window.padding[i - 2] - window.dilation[i - 2] * (window.kernel[i - 2] - 1) - 1;
    FASTRES_CHECK(x[i] > 0 && room >= 0, op, "kernel", "no larger than the padded input", show({window.kernel.data(), 2}));
    y[i] = room / window.stride[i - 2] + 1;
  }
  return y;
}

inline void check_output(const char* op, const ConvWindow& window, const Tensor& grad_y, const Shape& x) {
  const Shape y = output_shape(op, window, x, grad_y.size(1));
  FASTRES_CHECK(same(grad_y.sizes(), {y.data(), y.size()}), op, "grad_y", "of the output's shape " << show({y.data(), y.size()}),
                show(grad_y.sizes()));
}

// What products in tile registers take, besides a processor that has them.
inline void check_amx_operand(const char* op, const char* param, const Tensor& t) {
  check_cpu(op, param, t);
  FASTRES_CHECK(has_amx(), op, "the processor", "one with AMX", "one without");
  FASTRES_CHECK(t.scalar_type() == ScalarType::BFloat16 && t.dim() == 4 && t.numel() > 0 && t.size(1) % 16 == 0 &&
                    t.size(1) <= 2 * kConvMostRun && is_dense(t, Format::channels_last),
                op, param, "bfloat16, not empty, dense in channels_last, of channels in multiples of 16", show(t.sizes()));
}

// One side of a convolution. Tap i of the output's place o is x's pixel o * stride + at(i): number o + step(i) of every stride-th
// of x's pixels from phase(i) on.
struct ConvSide {
  int64_t size, out, taps, stride, padding, dilation;

  ConvSide(const ConvWindow& window, const Shape& x, const Shape& y, int i)
      : size(x[2 + i]), out(y[2 + i]), taps(window.kernel[i]), stride(window.stride[i]), padding(window.padding[i]),
        dilation(window.dilation[i]) {}

  int64_t at(int64_t tap) const { return tap * dilation - padding; }
  int64_t step(int64_t tap) const { return at(tap) >= 0 ? at(tap) / stride : -((stride - 1 - at(tap)) / stride); }
  int64_t phase(int64_t tap) const { return at(tap) - step(tap) * stride; }
  int64_t pixels(int64_t phase) const { return std::max<int64_t>(0, ceil_div(size - phase, stride)); }
};

}  // namespace fastres::cpu
