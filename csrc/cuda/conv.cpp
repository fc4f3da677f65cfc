// Binding of conv for few input channels: checks, outputs, launches, registration.
#include "cuda/conv.h"

#include "cuda/host.h"

namespace fastres::cuda {
namespace {

constexpr const char* kOp = "conv";

void check_16_bits(const char* param, const Tensor& t) {
  check_cuda(kOp, param, t);
  FASTRES_CHECK(t.scalar_type() == ScalarType::Half || t.scalar_type() == ScalarType::BFloat16, kOp, param,
                "float16 or bfloat16", show(t.scalar_type()));
}

void check_last(const char* param, const Tensor& t) {
  FASTRES_CHECK(is_dense(t, Format::channels_last), kOp, param, "dense and channels_last", "strides " << show(t.strides()));
  FASTRES_CHECK(is_aligned(t.data_ptr()), kOp, param, "aligned to 16 bytes", "the address " << t.data_ptr());
}

Span span(IntHeaderOnlyArrayRef kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, int d) {
  const auto within = [&](const char* param, IntHeaderOnlyArrayRef values, int64_t least, int64_t most) {
    FASTRES_CHECK(values.size() == 2 && values[d] >= least && values[d] <= most, kOp, param,
                  "two integers from " << least << " to " << most, show(values));
    return static_cast<int>(values[d]);
  };
  return {within("kernel", kernel, 1, d == 0 ? kMostWindowRows : kMostRowValues), within("stride", stride, 1, kMostWindowStride),
          within("padding", padding, 0, 127), 1};
}

WindowRows window_rows(int64_t channels, const Span& w) {
  FASTRES_CHECK(channels <= kMostRowValues, kOp, "x", "of at most " << kMostRowValues << " channels", channels);
  const WindowRows rows(static_cast<int>(channels), w);
  FASTRES_CHECK(rows.fits(), kOp, "a row of the window", "of 9 to 24 values, with one more where padding is odd",
                rows.values << " and " << rows.lead);
  return rows;
}

void check_channels_out(int64_t channels) {
  FASTRES_CHECK(channels > 0 && channels % 8 == 0 && channels < 1 << 20, kOp, "weight", "of a multiple of 8 output channels",
                channels);
}

struct Geometry {
  Images x;
  Window window;
  WindowRows rows;
  int height, width;  // of the output
};

// Checks x and what convolves it.
Geometry geometry(const Tensor& x, IntHeaderOnlyArrayRef kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding) {
  check_16_bits("x", x);
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0, kOp, "x", "of 4 dimensions (N, C, H, W), not empty", show(x.sizes()));
  const Window window{span(kernel, stride, padding, 0), span(kernel, stride, padding, 1)};
  const WindowRows rows = window_rows(x.size(1), window.w);
  FASTRES_CHECK(x.size(0) <= INT32_MAX && x.size(2) < 1 << 24 && x.size(3) < 1 << 24, kOp, "x",
                "of images of less than 2^24 pixels a side", show(x.sizes()));
  check_last("x", x);
  const Images images{static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
                      static_cast<int>(x.size(1))};
  FASTRES_CHECK(images.height + window.h.padding + window.h.last() > 0 && images.width + window.w.padding + window.w.last() > 0,
                kOp, "kernel", "no larger than x's padded size", show(kernel));
  return {images, window, rows, window.h.out(images.height), window.w.out(images.width)};
}

Tensor pack(const Tensor& weight, int64_t padding) {
  check_16_bits("weight", weight);
  FASTRES_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.numel() > 0, kOp, "weight",
                "contiguous, (C_out, KH, KW, C)", show(weight.sizes()));
  const std::array<int64_t, 2> kernel{weight.size(1), weight.size(2)}, one{1, 1}, around{0, padding};
  const auto of = [](const auto& values) { return IntHeaderOnlyArrayRef(values.data(), values.size()); };
  const Span h = span(of(kernel), of(one), of(around), 0), w = span(of(kernel), of(one), of(around), 1);
  const WindowRows rows = window_rows(weight.size(3), w);
  check_channels_out(weight.size(0));
  const int channels_out = static_cast<int>(weight.size(0));
  const Launch launch(kOp, weight);
  const Tensor packed = empty_vector(conv_rows_packed(rows, h.kernel, channels_out), weight.scalar_type(), weight);
  launch(launch_conv_rows_pack,
         {w, static_cast<int>(weight.size(3)), h.kernel, channels_out, weight.data_ptr(), packed.data_ptr()});
  return packed;
}

Tensor conv_rows(const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t channels_out,
                 IntHeaderOnlyArrayRef kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, const Text& act) {
  const Geometry g = geometry(x, kernel, stride, padding);
  check_channels_out(channels_out);
  const int64_t size = conv_rows_packed(g.rows, g.window.h.kernel, static_cast<int>(channels_out));
  FASTRES_CHECK(packed.is_cuda() && packed.get_device_index() == x.get_device_index(), kOp, "packed",
                "on the device of x, " << show_device(x), show_device(packed));
  FASTRES_CHECK(packed.scalar_type() == x.scalar_type() && packed.dim() == 1 && packed.size(0) == size &&
                    packed.is_contiguous() && is_aligned(packed.data_ptr()),
                kOp, "packed", "packed weights of x's dtype " << show(x.scalar_type()) << ", (" << size << ",)",
                show(packed.scalar_type()) << " " << show(packed.sizes()));
  const bool relu = is_relu(kOp, act);
  const std::array<int64_t, 4> sizes{x.size(0), channels_out, g.height, g.width};
  const Launch launch(kOp, x);
  const Tensor y = empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
  const OptionalTensor values = channel_vector(kOp, "bias", bias, y, ScalarType::Float);
  launch(launch_conv_rows,
         {dtype_of(x), relu, g.x, g.window, static_cast<int>(channels_out), x.data_ptr(), packed.data_ptr(),
          values ? static_cast<const float*>(values->data_ptr()) : nullptr, y.data_ptr()});
  return y;
}

// The gradient lies as (C_out, KH, KW, C).
Tensor conv_rows_backward_weight(const Tensor& grad_y, const Tensor& x, IntHeaderOnlyArrayRef kernel,
                                 IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding) {
  const Geometry g = geometry(x, kernel, stride, padding);
  check_cuda(kOp, "grad_y", grad_y);
  FASTRES_CHECK(grad_y.get_device_index() == x.get_device_index(), kOp, "grad_y", "on the device of x, " << show_device(x),
                show_device(grad_y));
  FASTRES_CHECK(grad_y.scalar_type() == x.scalar_type(), kOp, "grad_y", "of the dtype of x, " << show(x.scalar_type()),
                show(grad_y.scalar_type()));
  FASTRES_CHECK(grad_y.dim() == 4 && grad_y.size(0) == x.size(0) && grad_y.size(2) == g.height && grad_y.size(3) == g.width,
                kOp, "grad_y", "(" << x.size(0) << ", C_out, " << g.height << ", " << g.width << ")", show(grad_y.sizes()));
  check_channels_out(grad_y.size(1));
  check_last("grad_y", grad_y);
  const std::array<int64_t, 4> sizes{grad_y.size(1), g.window.h.kernel, g.window.w.kernel, x.size(1)};
  const Launch launch(kOp, x);
  const Tensor grad_weight = empty_activation({sizes.data(), sizes.size()}, Format::contiguous, x);
  ConvRowsBackwardParams params{dtype_of(x), g.x, g.window, static_cast<int>(grad_y.size(1)), grad_y.data_ptr(),
                                x.data_ptr(), nullptr, grad_weight.data_ptr()};
  const Tensor partial = empty_vector(conv_rows_partials(params), ScalarType::Float, x);
  params.partial = static_cast<float*>(partial.data_ptr());
  launch(launch_conv_rows_backward, params);
  return grad_weight;
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("conv_rows_pack(Tensor weight, int padding) -> Tensor");
  m.def(
      "conv_rows(Tensor x, Tensor packed, Tensor? bias, int channels_out, int[] kernel, int[] stride, int[] padding, str act) "
      "-> Tensor");
  m.def("conv_rows_backward_weight(Tensor grad_y, Tensor x, int[] kernel, int[] stride, int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("conv_rows_pack", TORCH_BOX(&fastres::cuda::pack));
  m.impl("conv_rows", TORCH_BOX(&fastres::cuda::conv_rows));
  m.impl("conv_rows_backward_weight", TORCH_BOX(&fastres::cuda::conv_rows_backward_weight));
}
