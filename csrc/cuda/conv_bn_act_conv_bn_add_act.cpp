// Binding of two and of three convolutions in one launch: checks, outputs, launch, registration.
#include "cuda/conv_bn_act_conv_bn_add_act.h"

#include "cuda/tma_host.h"

namespace fastres::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act_conv_bn_add_act";

// One direction of a window that keeps the image's size.
Span span(int64_t kernel, IntHeaderOnlyArrayRef dilation, int d) {
  FASTRES_CHECK(dilation.size() == 2 && dilation[d] >= 1 && dilation[d] <= 127, kOp, "dilation", "two integers from 1 to 127",
                show(dilation));
  const int64_t reach = (kernel - 1) * dilation[d];
  FASTRES_CHECK(kernel % 2 == 1 && reach <= 127, kOp, "weight", "of an odd number of pixels, of at most 128, dilated",
                kernel << ", dilated " << reach + 1);
  return {static_cast<int>(kernel), 1, static_cast<int>(reach / 2), static_cast<int>(dilation[d])};
}

// A weight of one pixel, of so many channels in.
void check_pointwise(const char* param, const Tensor& weight, const Tensor& x, int64_t channels) {
  check_tma_tensor(kOp, param, weight, x);
  FASTRES_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.size(3) == channels && weight.size(1) * weight.size(2) == 1,
                kOp, param, "contiguous, (C_out, 1, 1, " << channels << ")", show(weight.sizes()));
}

// The last convolution's input is the first one's output, that of the next is y.
struct Next {
  const Tensor &weight, &bias;
  const Text& act;
};

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& last_weight,
                               const Tensor& last_bias, const Tensor& residual, IntHeaderOnlyArrayRef dilation, const Text& act,
                               const Text& last_act, const Next* next) {
  check_tma_images(kOp, x);
  const int64_t channels = x.size(1);
  FASTRES_CHECK(channels == 64 || channels == 128, kOp, "x", "of 64 or 128 channels", channels);
  check_tma_tensor(kOp, "weight", weight, x);
  FASTRES_CHECK(weight.dim() == 4 && weight.is_contiguous() && weight.size(0) == channels && weight.size(3) == channels, kOp,
                "weight", "contiguous, (" << channels << ", KH, KW, " << channels << ")", show(weight.sizes()));
  check_pointwise("last_weight", last_weight, x, channels);
  FASTRES_CHECK(last_weight.size(0) > 0 && last_weight.size(0) % 64 == 0, kOp, "last_weight",
                "of a multiple of 64 channels out", last_weight.size(0));
  ConvActConvActParams params{};
  params.window = {span(weight.size(1), dilation, 0), span(weight.size(2), dilation, 1)};
  const Span &h = params.window.h, &w = params.window.w;
  FASTRES_CHECK(x.size(0) * (x.size(2) + h.padding) * (x.size(3) + w.padding) < 1 << 30, kOp, "x",
                "of less than 2^30 pixels, padded", show(x.sizes()));
  const int64_t reach = int64_t{h.kernel - 1} * h.dilation * (x.size(3) + w.padding) + int64_t{w.kernel - 1} * w.dilation;
  FASTRES_CHECK(reach * channels <= 8192, kOp, "x", "narrow: a window may reach over " << 8192 / channels << " pixels",
                reach << " pixels of rows of " << x.size(3));
  const std::array<int64_t, 4> sizes{x.size(0), last_weight.size(0), x.size(2), x.size(3)};
  const Launch launch(kOp, x);
  const Tensor y = empty_activation({sizes.data(), sizes.size()}, Format::channels_last, x);
  check_tma_residual(kOp, residual, y, x);
  const Tensor values = channel_vector(kOp, "bias", bias, x, ScalarType::Float);
  const Tensor last_values = channel_vector(kOp, "last_bias", last_bias, y, ScalarType::Float);
  Tensor z, next_values;
  if (next != nullptr) {
    check_pointwise("next_weight", next->weight, x, y.size(1));
    FASTRES_CHECK(next->weight.size(0) == channels, kOp, "next_weight", "of " << channels << " channels out",
                  next->weight.size(0));
    z = empty_activation(x.sizes(), Format::channels_last, x);
    next_values = channel_vector(kOp, "next_bias", next->bias, z, ScalarType::Float);
    params.next_weight = next->weight.data_ptr();
    params.next_bias = static_cast<const float*>(next_values.data_ptr());
    params.next_relu = is_relu(kOp, next->act);
    params.z = z.data_ptr();
  }
  params.dtype = dtype_of(x);
  params.relu = is_relu(kOp, act);
  params.last_relu = is_relu(kOp, last_act);
  params.x = {static_cast<int>(x.size(0)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3)),
              static_cast<int>(channels)};
  params.channels_out = static_cast<int>(last_weight.size(0));
  params.x_data = x.data_ptr();
  params.weight = weight.data_ptr();
  params.bias = static_cast<const float*>(values.data_ptr());
  params.last_weight = last_weight.data_ptr();
  params.last_bias = static_cast<const float*>(last_values.data_ptr());
  params.residual = residual.data_ptr();
  params.y = y.data_ptr();
  launch(launch_sm90_conv_act_conv_act, params);
  return {y, z};
}

Tensor sm90_conv_act_conv_act(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& last_weight,
                              const Tensor& last_bias, const Tensor& residual, IntHeaderOnlyArrayRef dilation, const Text& act,
                              const Text& last_act) {
  return std::get<0>(run(x, weight, bias, last_weight, last_bias, residual, dilation, act, last_act, nullptr));
}

std::tuple<Tensor, Tensor> sm90_conv_act_conv_act_conv_act(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                           const Tensor& last_weight, const Tensor& last_bias,
                                                           const Tensor& residual, const Tensor& next_weight,
                                                           const Tensor& next_bias, IntHeaderOnlyArrayRef dilation,
                                                           const Text& act, const Text& last_act, const Text& next_act) {
  const Next next{next_weight, next_bias, next_act};
  return run(x, weight, bias, last_weight, last_bias, residual, dilation, act, last_act, &next);
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def(
      "sm90_conv_act_conv_act(Tensor x, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias, Tensor residual, "
      "int[] dilation, str act, str last_act) -> Tensor");
  m.def(
      "sm90_conv_act_conv_act_conv_act(Tensor x, Tensor weight, Tensor bias, Tensor last_weight, Tensor last_bias, "
      "Tensor residual, Tensor next_weight, Tensor next_bias, int[] dilation, str act, str last_act, str next_act) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("sm90_conv_act_conv_act", TORCH_BOX(&fastres::cuda::sm90_conv_act_conv_act));
  m.impl("sm90_conv_act_conv_act_conv_act", TORCH_BOX(&fastres::cuda::sm90_conv_act_conv_act_conv_act));
}
