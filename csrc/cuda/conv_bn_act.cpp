// Binding of the convolutions with folded weights: checks, output, launch, registration.
#include "cuda/conv_bn_act.h"

#include "cuda/host.h"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act";

void check_aligned(const char* param, const Tensor& t) {
  FASTRES_CHECK(is_aligned(t.data_ptr()), kOp, param, "aligned to 16 bytes", "the address " << t.data_ptr());
}

// The weight as it lies in memory, (C_out, KH, KW, C_in).
void check_weight(const Tensor& t, const Tensor& x) {
  FASTRES_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), kOp, "weight",
                "on the device of x, " << show_device(x), show_device(t));
  FASTRES_CHECK(t.scalar_type() == x.scalar_type() && t.dim() == 4 && t.is_contiguous() && t.size(3) == x.size(1), kOp,
                "weight", "contiguous, (C_out, KH, KW, " << x.size(1) << ") of x's dtype " << show(x.scalar_type()),
                show(t.scalar_type()) << " " << show(t.sizes()));
}

// One direction of the window; the TMA unit holds its corners in 8 bits with a sign, shifts in 8 without.
Span span(int64_t kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation, int d) {
  const auto within = [&](const char* param, IntHeaderOnlyArrayRef values, int64_t least, int64_t most) {
    FASTRES_CHECK(values.size() == 2 && values[d] >= least && values[d] <= most, kOp, param,
                  "two integers from " << least << " to " << most, show(values));
    return static_cast<int>(values[d]);
  };
  const int dilated = within("dilation", dilation, 1, 255);
  FASTRES_CHECK(kernel > 0 && (kernel - 1) * dilated <= 127, kOp, "weight", "of at most 128 pixels, dilated",
                (kernel - 1) * dilated + 1);
  return {static_cast<int>(kernel), within("stride", stride, 1, 8), within("padding", padding, 0, 127), dilated};
}

void check_channels(const char* param, int64_t channels) {
  FASTRES_CHECK(channels > 0 && channels % 8 == 0, kOp, param, "of a multiple of 8 channels", channels);
}

Tensor sm90_conv_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& residual,
                     IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                     const Text& act) {
  check_cuda(kOp, "x", x);
  FASTRES_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, kOp, "x",
                "float16 or bfloat16", show(x.scalar_type()));
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0 && x.numel() / x.size(1) <= INT32_MAX, kOp, "x",
                "of 4 dimensions (N, C, H, W), not empty, of less than 2^31 pixels", show(x.sizes()));
  FASTRES_CHECK(is_dense(x, Format::channels_last), kOp, "x", "dense and channels_last", "strides " << show(x.strides()));
  check_weight(weight, x);
  check_channels("x", x.size(1));
  check_channels("weight", weight.size(0));
  const bool relu = is_relu(kOp, act);
  const Window window{span(weight.size(1), stride, padding, dilation, 0), span(weight.size(2), stride, padding, dilation, 1)};
  const Images images{static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                      static_cast<int>(x.size(1))};
  const int height = window.h.out(images.height), width = window.w.out(images.width);
  FASTRES_CHECK(images.height + window.h.padding + window.h.last() > 0 && images.width + window.w.padding + window.w.last() > 0,
                kOp, "weight", "no larger than x's padded size", show(weight.sizes()));

  const std::array<int64_t, 4> sizes{x.size(0), weight.size(0), height, width};
  const Launch launch(kOp, x);
  const Tensor y = empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
  const Tensor values = channel_vector(kOp, "bias", bias, y, ScalarType::Float);
  if (residual) {
    check_like(kOp, "residual", *residual, y);
    FASTRES_CHECK(is_dense(*residual, Format::channels_last), kOp, "residual", "dense and channels_last",
                  "strides " << show(residual->strides()));
    check_aligned("residual", *residual);
  }
  check_aligned("x", x);
  check_aligned("weight", weight);
  launch(launch_sm90_conv_act,
         {dtype_of(x), relu, images, window, static_cast<int>(weight.size(0)), x.data_ptr(), weight.data_ptr(),
          static_cast<const float*>(values.data_ptr()), residual ? residual->data_ptr() : nullptr, y.data_ptr()});
  return y;
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def(
      "sm90_conv_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "str act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) { m.impl("sm90_conv_act", TORCH_BOX(&fastres::cuda::sm90_conv_act)); }
