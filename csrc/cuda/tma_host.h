// What bindings of kernels whose operands the TMA unit brings ask of tensors.
#pragma once

#include "cuda/host.h"
#include "cuda/launch.h"

namespace fastres::cuda {

inline void check_tma_tensor(const char* op, const char* param, const Tensor& t, const Tensor& x) {
  FASTRES_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), op, param,
                "on the device of x, " << show_device(x), show_device(t));
  FASTRES_CHECK(t.scalar_type() == x.scalar_type(), op, param, "of x's dtype " << show(x.scalar_type()),
                show(t.scalar_type()));
  FASTRES_CHECK(is_aligned(t.data_ptr()), op, param, "aligned to 16 bytes", "the address " << t.data_ptr());
}

inline void check_tma_images(const char* op, const Tensor& x) {
  check_cuda(op, "x", x);
  FASTRES_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, op, "x",
                "float16 or bfloat16", show(x.scalar_type()));
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0 && is_dense(x, Format::channels_last), op, "x",
                "of 4 dimensions (N, C, H, W), not empty, dense and channels_last",
                show(x.sizes()) << ", strides " << show(x.strides()));
  check_tma_tensor(op, "x", x, x);
}

// A residual of y's size.
inline void check_tma_residual(const char* op, const Tensor& residual, const Tensor& y, const Tensor& x) {
  check_like(op, "residual", residual, y);
  FASTRES_CHECK(is_dense(residual, Format::channels_last), op, "residual", "dense and channels_last",
                "strides " << show(residual.strides()));
  check_tma_tensor(op, "residual", residual, x);
}

}  // namespace fastres::cuda
