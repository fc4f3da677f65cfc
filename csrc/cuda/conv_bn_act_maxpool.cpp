// Binding of conv_bn_act_maxpool for few input channels: checks, output, launch, registration.
#include "cuda/conv_bn_act_maxpool.h"

#include "cuda/host.h"

namespace fastres::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act_maxpool";

Span span(IntHeaderOnlyArrayRef kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, int d) {
  const auto within = [&](const char* param, IntHeaderOnlyArrayRef values, int64_t least, int64_t most) {
    FASTRES_CHECK(values.size() == 2 && values[d] >= least && values[d] <= most, kOp, param,
                  "two integers from " << least << " to " << most, show(values));
    return static_cast<int>(values[d]);
  };
  return {within("kernel", kernel, 1, d == 0 ? kMostWindowRows : kMostRowValues), within("stride", stride, 1, kMostWindowStride),
          within("padding", padding, 0, 127), 1};
}

void check_x(const Tensor& x) {
  check_cuda(kOp, "x", x);
  FASTRES_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, kOp, "x",
                "float16 or bfloat16", show(x.scalar_type()));
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0, kOp, "x", "of 4 dimensions (N, C, H, W), not empty", show(x.sizes()));
  FASTRES_CHECK(x.size(1) <= kMostRowValues, kOp, "x", "of at most " << kMostRowValues << " channels", x.size(1));
  FASTRES_CHECK(x.size(0) <= INT32_MAX && x.size(2) < 1 << 24 && x.size(3) < 1 << 24, kOp, "x",
                "of images of less than 2^24 pixels a side", show(x.sizes()));
  FASTRES_CHECK(is_dense(x, Format::channels_last), kOp, "x", "dense and channels_last", "strides " << show(x.strides()));
  FASTRES_CHECK(is_aligned(x.data_ptr()), kOp, "x", "aligned to 16 bytes", "the address " << x.data_ptr());
}

void check_packed(const Tensor& packed, const Tensor& x, int64_t size) {
  FASTRES_CHECK(packed.is_cuda() && packed.get_device_index() == x.get_device_index(), kOp, "packed",
                "on the device of x, " << show_device(x), show_device(packed));
  FASTRES_CHECK(packed.scalar_type() == x.scalar_type() && packed.dim() == 1 && packed.size(0) == size &&
                    packed.is_contiguous() && is_aligned(packed.data_ptr()),
                kOp, "packed", "packed weights of x's dtype " << show(x.scalar_type()) << ", (" << size << ",)",
                show(packed.scalar_type()) << " " << show(packed.sizes()));
}

// packed: what conv_rows_pack makes of the weight. Behind the convolution a ReLU, then windows of 3x3, stride 2, padding 1.
Tensor conv_rows_maxpool(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t channels_out,
                         IntHeaderOnlyArrayRef kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding) {
  check_x(x);
  const Window window{span(kernel, stride, padding, 0), span(kernel, stride, padding, 1)};
  const Images images{static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                      static_cast<int>(x.size(1))};
  const WindowRows rows(images.channels, window.w);
  FASTRES_CHECK(rows.fits(), kOp, "a row of the window", "of 9 to 24 values, with one more where padding is odd",
                rows.values << " and " << rows.lead);
  FASTRES_CHECK(images.height + window.h.padding + window.h.last() > 0 && images.width + window.w.padding + window.w.last() > 0,
                kOp, "kernel", "no larger than x's padded size", show(kernel));
  FASTRES_CHECK(channels_out > 0 && channels_out % 8 == 0 && channels_out < 1 << 20, kOp, "weight",
                "of a multiple of 8 output channels", channels_out);
  check_packed(packed, x, conv_rows_packed(rows, window.h.kernel, static_cast<int>(channels_out)));
  const std::array<int64_t, 4> sizes{x.size(0), channels_out, pooled(window.h.out(images.height)),
                                     pooled(window.w.out(images.width))};
  const Launch launch(kOp, x);
  const Tensor y = empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
  const OptionalTensor values = channel_vector(kOp, "bias", bias, y, ScalarType::Float);
  launch(launch_conv_rows_maxpool,
         {dtype_of(x), true, images, window, static_cast<int>(channels_out), x.data_ptr(), packed.data_ptr(),
          values ? static_cast<const float*>(values->data_ptr()) : nullptr, y.data_ptr()});
  return y;
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def(
      "conv_rows_maxpool(Tensor x, Tensor packed, Tensor? bias, int channels_out, int[] kernel, int[] stride, int[] padding) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) { m.impl("conv_rows_maxpool", TORCH_BOX(&fastres::cuda::conv_rows_maxpool)); }
