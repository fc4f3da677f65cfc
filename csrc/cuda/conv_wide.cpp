// Bindings of the convolutions by Hopper's widest products: checks, outputs, launches, registration.
#include "cuda/conv_wide.h"

#include "cuda/bn_host.h"
#include "cuda/tma_host.h"

namespace fastres::cuda {
namespace {

// One direction of the window; the TMA unit holds its corners in 8 bits with a sign, shifts in 8 without.
Span span(const char* op, int64_t kernel, IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
          IntHeaderOnlyArrayRef dilation, int d) {
  const auto within = [&](const char* param, IntHeaderOnlyArrayRef values, int64_t least, int64_t most) {
    FASTRES_CHECK(values.size() == 2 && values[d] >= least && values[d] <= most, op, param,
                  "two integers from " << least << " to " << most, show(values));
    return static_cast<int>(values[d]);
  };
  const int dilated = within("dilation", dilation, 1, 255);
  FASTRES_CHECK(kernel > 0 && (kernel - 1) * dilated <= 127, op, "weight", "of at most 128 pixels, dilated",
                (kernel - 1) * dilated + 1);
  return {static_cast<int>(kernel), within("stride", stride, 1, 8), within("padding", padding, 0, 127), dilated};
}

// Checks x, weight and window; what is added and y remain to be said.
ConvActParams convolution(const char* op, const Tensor& x, const Tensor& weight, IntHeaderOnlyArrayRef stride,
                          IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation) {
  check_tma_images(op, x);
  check_tma_tensor(op, "weight", weight, x);
  FASTRES_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.size(3) == x.size(1), op, "weight",
                "contiguous, (C_out, KH, KW, " << x.size(1) << ")", show(weight.sizes()));
  FASTRES_CHECK(x.size(1) % 8 == 0 && weight.size(0) > 0 && weight.size(0) % 8 == 0, op, "weight",
                "of multiples of 8 channels in and out", show(weight.sizes()));
  ConvActParams params{};
  params.dtype = dtype_of(x);
  params.window = {span(op, weight.size(1), stride, padding, dilation, 0), span(op, weight.size(2), stride, padding, dilation, 1)};
  const Span &h = params.window.h, &w = params.window.w;
  FASTRES_CHECK(x.size(0) * (x.size(2) + 2 * h.padding) * (x.size(3) + 2 * w.padding) < 1 << 30, op, "x",
                "of less than 2^30 pixels, padded", show(x.sizes()));
  params.x = {static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
              static_cast<int>(x.size(1))};
  FASTRES_CHECK(params.x.height + h.padding + h.last() > 0 && params.x.width + w.padding + w.last() > 0, op, "weight",
                "no larger than x's padded size", show(weight.sizes()));
  params.channels_out = static_cast<int>(weight.size(0));
  params.x_data = x.data_ptr();
  params.weight = weight.data_ptr();
  return params;
}

std::array<int64_t, 4> output_sizes(const ConvActParams& params) {
  return {params.x.count, params.channels_out, params.window.h.out(params.x.height), params.window.w.out(params.x.width)};
}

Tensor empty_output(const ConvActParams& params, const Tensor& x) {
  const auto sizes = output_sizes(params);
  return empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
}

Tensor sm90_conv_wide(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& residual,
                      IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation,
                      const Text& act) {
  const char* op = "conv_bn_act";
  ConvActParams params = convolution(op, x, weight, stride, padding, dilation);
  params.relu = is_relu(op, act);
  const Launch launch(op, x);
  const Tensor y = empty_output(params, x);
  const Tensor values = channel_vector(op, "bias", bias, y, ScalarType::Float);
  if (residual) {
    check_tma_residual(op, *residual, y, x);
    params.residual = residual->data_ptr();
  }
  params.bias = static_cast<const float*>(values.data_ptr());
  params.y = y.data_ptr();
  launch(launch_sm90_conv_wide, params);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> sm90_conv_wide_statistics(const Tensor& x, const Tensor& weight,
                                                             IntHeaderOnlyArrayRef stride, IntHeaderOnlyArrayRef padding,
                                                             IntHeaderOnlyArrayRef dilation) {
  const char* op = "conv_statistics";
  ConvStatisticsParams params{};
  params.conv = convolution(op, x, weight, stride, padding, dilation);
  const Launch launch(op, x);
  const Tensor y = empty_output(params.conv, x);
  params.conv.y = y.data_ptr();
  params.parts = sm90_conv_wide_parts(params.conv);
  const int64_t channels = params.conv.channels_out, moments = 2 * params.parts * channels;
  const Tensor mean = empty_vector(channels, ScalarType::Float, x), var = empty_vector(channels, ScalarType::Float, x);
  const Tensor workspace = empty_vector(moments + params.parts, ScalarType::Float, x);
  params.moments = static_cast<float*>(workspace.data_ptr());
  params.counts = params.moments + moments;
  params.mean = static_cast<float*>(mean.data_ptr());
  params.var = static_cast<float*>(var.data_ptr());
  launch(launch_sm90_conv_wide_statistics, params);
  return {y, mean, var};
}

// The gradient by a convolution's input is one of grad_y by its weight turned, whose output channels are the input's: the weight
// is laid out so, its taps as they were; padding is that of the turned window.
std::tuple<Tensor, Tensor, Tensor> sm90_conv_wide_gradient(const Tensor& grad_y, const Tensor& weight, const Tensor& x,
                                                           const OptionalTensor& bn_weight, const OptionalTensor& bn_bias,
                                                           const Tensor& mean, const Tensor& var, double eps, const Text& act,
                                                           IntHeaderOnlyArrayRef padding, IntHeaderOnlyArrayRef dilation) {
  const char* op = "conv_backward_bn_act";
  const std::array<int64_t, 2> once{1, 1};
  ConvGradientParams params{};
  BnActBackwardParams& norm = params.norm;
  params.conv = convolution(op, grad_y, weight, {once.data(), once.size()}, padding, dilation);
  params.conv.relu = norm.relu = is_relu(op, act);
  const Launch launch(op, grad_y);
  const auto sizes = output_sizes(params.conv);
  check_tma_tensor(op, "x", x, grad_y);
  FASTRES_CHECK(x.dim() == 4 && std::equal(sizes.begin(), sizes.end(), x.sizes().begin()) && is_dense(x, Format::channels_last),
                op, "x", "channels_last, of sizes " << show({sizes.data(), sizes.size()}),
                show(x.sizes()) << ", strides " << show(x.strides()));
  norm.geometry = divide(op, {{"x", x}});
  norm.geometry.splits = sm90_conv_wide_parts(params.conv);
  norm.training = true;
  norm.eps = static_cast<float>(eps);
  const BnArguments args(op, x, bn_weight, bn_bias, mean, var);
  const Gradients found = prepare_gradients(norm, x, args);
  norm.grad_y = norm.grad_x;  // each thread of the last pass reads a vector before it writes it
  params.conv.residual = norm.x;
  params.conv.y = norm.grad_x;
  launch(launch_sm90_conv_wide_gradient, params);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def(
      "sm90_conv_wide(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int[] stride, int[] padding, int[] dilation, "
      "str act) -> Tensor");
  m.def("sm90_conv_wide_statistics(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation)"
        " -> (Tensor, Tensor, Tensor)");
  m.def("sm90_conv_wide_gradient(Tensor grad_y, Tensor weight, Tensor x, Tensor? bn_weight, Tensor? bn_bias, Tensor mean,"
        " Tensor var, float eps, str act, int[] padding, int[] dilation) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("sm90_conv_wide", TORCH_BOX(&fastres::cuda::sm90_conv_wide));
  m.impl("sm90_conv_wide_statistics", TORCH_BOX(&fastres::cuda::sm90_conv_wide_statistics));
  m.impl("sm90_conv_wide_gradient", TORCH_BOX(&fastres::cuda::sm90_conv_wide_gradient));
}
