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

void check_device(const char* param, const Tensor& t, const Tensor& x) {
  FASTRES_CHECK(t.is_cuda() && t.get_device_index() == x.get_device_index(), kOp, param,
                "on the device of x, " << show_device(x), show_device(t));
}

// An input, the main one or the shortcut.
void check_input(const char* param, const Tensor& t) {
  FASTRES_CHECK(t.dim() == 4 && t.numel() > 0 && t.numel() / t.size(1) <= INT32_MAX, kOp, param,
                "of 4 dimensions (N, C, H, W), not empty, of less than 2^31 pixels", show(t.sizes()));
  FASTRES_CHECK(is_dense(t, Format::channels_last), kOp, param, "dense and channels_last", "strides " << show(t.strides()));
}

// A weight as it lies in memory, (C_out, KH, KW, C_in).
void check_weight(const char* param, const Tensor& t, const Tensor& x) {
  check_device(param, t, x);
  FASTRES_CHECK(t.scalar_type() == x.scalar_type() && t.dim() == 4 && t.is_contiguous() && t.size(3) == x.size(1), kOp,
                param, "contiguous, (C_out, KH, KW, " << x.size(1) << ") of x's dtype " << show(x.scalar_type()),
                show(t.scalar_type()) << " " << show(t.sizes()));
}

Images images_of(const Tensor& x) {
  return {static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)), static_cast<int>(x.size(1))};
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

// Adds the shortcut to the params: what a projection of it gives must have y's size.
void add_shortcut(ConvActParams& params, const Tensor& x, const Tensor& y, const Tensor& shortcut, const Tensor& weight,
                  IntHeaderOnlyArrayRef stride) {
  check_device("shortcut", shortcut, x);
  FASTRES_CHECK(shortcut.scalar_type() == x.scalar_type(), kOp, "shortcut", "of x's dtype " << show(x.scalar_type()),
                show(shortcut.scalar_type()));
  check_input("shortcut", shortcut);
  check_channels("shortcut", shortcut.size(1));
  check_weight("shortcut_weight", weight, shortcut);
  FASTRES_CHECK(weight.size(0) == y.size(1) && weight.size(1) * weight.size(2) == 1, kOp, "shortcut_weight",
                "of " << y.size(1) << " channels out and one pixel", show(weight.sizes()));
  check_aligned("shortcut", shortcut);
  check_aligned("shortcut_weight", weight);
  const std::array<int64_t, 2> none{0, 0}, one{1, 1};
  params.shortcut = images_of(shortcut);
  params.shortcut_window = {span(1, stride, {none.data(), 2}, {one.data(), 2}, 0),
                            span(1, stride, {none.data(), 2}, {one.data(), 2}, 1)};
  const int height = params.shortcut_window.h.out(params.shortcut.height);
  const int width = params.shortcut_window.w.out(params.shortcut.width);
  FASTRES_CHECK(shortcut.size(0) == y.size(0) && height == y.size(2) && width == y.size(3), kOp, "shortcut",
                "projected to the output's size " << show(y.sizes()), height << " x " << width << " of " << shortcut.size(0));
  params.shortcut_data = shortcut.data_ptr();
  params.shortcut_weight = weight.data_ptr();
}

Tensor sm90_conv_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& residual,
                     const OptionalTensor& shortcut, const OptionalTensor& shortcut_weight,
                     const OptionalTensor& shortcut_bias, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                     IntHeaderOnlyArrayRef dilation, IntHeaderOnlyArrayRef shortcut_stride, const Text& act) {
  check_cuda(kOp, "x", x);
  FASTRES_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16, kOp, "x",
                "float16 or bfloat16", show(x.scalar_type()));
  check_input("x", x);
  check_weight("weight", weight, x);
  check_channels("x", x.size(1));
  check_channels("weight", weight.size(0));
  ConvActParams params{};
  params.dtype = dtype_of(x);
  params.relu = is_relu(kOp, act);
  params.window = {span(weight.size(1), stride, padding, dilation, 0), span(weight.size(2), stride, padding, dilation, 1)};
  params.x = images_of(x);
  const Span &h = params.window.h, &w = params.window.w;
  FASTRES_CHECK(params.x.height + h.padding + h.last() > 0 && params.x.width + w.padding + w.last() > 0, kOp, "weight",
                "no larger than x's padded size", show(weight.sizes()));

  const std::array<int64_t, 4> sizes{x.size(0), weight.size(0), h.out(params.x.height), w.out(params.x.width)};
  const Launch launch(kOp, x);
  const Tensor y = empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
  const Tensor values = channel_vector(kOp, "bias", bias, y, ScalarType::Float);
  if (residual) {
    check_like(kOp, "residual", *residual, y);
    FASTRES_CHECK(is_dense(*residual, Format::channels_last), kOp, "residual", "dense and channels_last",
                  "strides " << show(residual->strides()));
    check_aligned("residual", *residual);
    params.residual = residual->data_ptr();
  }
  FASTRES_CHECK(bool(shortcut) == bool(shortcut_weight) && bool(shortcut) == bool(shortcut_bias), kOp, "shortcut",
                "given with its weight and its bias", "some of them alone");
  OptionalTensor shortcut_values;
  if (shortcut) {
    add_shortcut(params, x, y, *shortcut, *shortcut_weight, shortcut_stride);
    shortcut_values = channel_vector(kOp, "shortcut_bias", *shortcut_bias, y, ScalarType::Float);
    params.shortcut_bias = static_cast<const float*>(shortcut_values->data_ptr());
  }
  check_aligned("x", x);
  check_aligned("weight", weight);
  params.channels_out = static_cast<int>(weight.size(0));
  params.x_data = x.data_ptr();
  params.weight = weight.data_ptr();
  params.bias = static_cast<const float*>(values.data_ptr());
  params.y = y.data_ptr();
  params.splits = sm90_conv_splits(params);
  OptionalTensor partial;
  if (params.splits > 1) {
    partial = empty_vector(params.splits * y.numel(), ScalarType::Float, x);
    params.partial = static_cast<float*>(partial->data_ptr());
  }
  launch(launch_sm90_conv_act, params);
  return y;
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def(
      "sm90_conv_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? shortcut, Tensor? shortcut_weight, "
      "Tensor? shortcut_bias, int[] stride, int[] padding, int[] dilation, int[] shortcut_stride, str act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) { m.impl("sm90_conv_act", TORCH_BOX(&fastres::cuda::sm90_conv_act)); }
