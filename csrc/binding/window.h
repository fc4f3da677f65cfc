// The checks of a pooling window, which the CPU and CUDA bindings share.
#pragma once

#include "binding/check.h"

namespace fastres {

using Ints = std::vector<int64_t>;

// A window over the planes of x, and the sizes of the planes it gives.
struct PoolWindow {
  std::array<int64_t, 2> kernel, stride, padding, out;
};

// As torch.max_pool2d asks: every window holds at least one element of x. `most` positions in a window, at most.
inline PoolWindow check_window(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride,
                               const Ints& padding, int64_t most) {
  const auto check_pair = [&](const char* param, const Ints& values, int64_t least) {
    FASTRES_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least, op, param,
                  "two integers of at least " << least, show({values.data(), values.size()}));
  };
  check_pair("kernel_size", kernel, 1);
  check_pair("stride", stride, 1);
  check_pair("padding", padding, 0);
  PoolWindow window{};
  for (int i = 0; i < 2; ++i) {
    const int64_t size = x.size(2 + i);
    FASTRES_CHECK(padding[i] <= kernel[i] / 2, op, "padding", "at most half of kernel_size " << kernel[i], padding[i]);
    FASTRES_CHECK(kernel[i] - 2 * padding[i] <= size, op, "kernel_size", "at most x's padded size " << size + 2 * padding[i],
                  kernel[i]);
    window.kernel[i] = kernel[i];
    window.stride[i] = stride[i];
    window.padding[i] = padding[i];
    window.out[i] = (size + 2 * padding[i] - kernel[i]) / stride[i] + 1;
  }
  FASTRES_CHECK(kernel[0] <= most / kernel[1], op, "kernel_size", "of at most " << most << " positions",
                show({kernel.data(), 2}));
  return window;
}

inline std::array<int64_t, 4> pooled_sizes(const Tensor& x, const PoolWindow& window) {
  return {x.size(0), x.size(1), window.out[0], window.out[1]};
}

// grad_y lies in memory as the output of pooling x does.
inline void check_pooled(const char* op, const char* param, const Tensor& grad_y, const Tensor& x,
                         const PoolWindow& window, Format format) {
  const std::array<int64_t, 4> sizes = pooled_sizes(x, window);
  FASTRES_CHECK(grad_y.is_cpu() == x.is_cpu() && grad_y.get_device_index() == x.get_device_index(), op, param,
                "on the device of x, " << show_device(x), show_device(grad_y));
  FASTRES_CHECK(grad_y.scalar_type() == x.scalar_type(), op, param, "of the dtype of x, " << show(x.scalar_type()),
                show(grad_y.scalar_type()));
  FASTRES_CHECK(same(grad_y.sizes(), sizes), op, param, "of the sizes of y, " << show(sizes), show(grad_y.sizes()));
  FASTRES_CHECK(is_dense(grad_y, format), op, param, "dense in the memory format of x",
                "strides " << show(grad_y.strides()) << " for sizes " << show(sizes));
}

}  // namespace fastres
