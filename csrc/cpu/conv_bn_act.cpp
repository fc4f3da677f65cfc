// Binding of conv_bn_act: checks, output, registration.
#include "cpu/conv_bn_act.h"

#include <array>

#include "cpu/conv_host.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_bn_act";
using Ints = std::vector<int64_t>;
using Pair = std::array<int64_t, 2>;

Pair pair_of(const char* param, const Ints& values, int64_t least) {
  FASTRES_CHECK(values.size() == 2 && values[0] >= least && values[1] >= least && std::max(values[0], values[1]) < 1 << 20,
                kOp, param, "two numbers of at least " << least, show({values.data(), values.size()}));
  return {values[0], values[1]};
}

// The dtype of t, if this machine convolves it.
DType convolved_dtype(const char* param, const Tensor& t) {
  check_cpu(kOp, param, t);
  FASTRES_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, kOp, param,
                "float32 or bfloat16", show(t.scalar_type()));
  const char* lacks = conv_lacks(dtype_of(t));
  FASTRES_CHECK(lacks == nullptr, kOp, "the processor", "one with " << lacks << " for " << show(t.scalar_type()), "one without");
  return dtype_of(t);
}

// With `winograd` the weights are transformed. `channels` is how many channels of x are read, over all groups, at least x's own:
// with `padded`, x is first copied with that many channels and its padding.
Tensor conv_bn_act(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, const Tensor& bias,
                   const Ints& kernel_size, const Ints& stride, const Ints& padding, const Ints& dilation,
                   int64_t groups, int64_t channels, bool padded, bool winograd, const Text& act) {
  const DType dtype = convolved_dtype("x", x);
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0, kOp, "x", "four-dimensional and not empty", show(x.sizes()));
  const int64_t size = element_size(dtype), out_channels = bias.numel();
  const Pair kernel = pair_of("kernel_size", kernel_size, 1), by = pair_of("stride", stride, 1);
  const Pair pads = pair_of("padding", padding, 0), spread = pair_of("dilation", dilation, 1);
  const int64_t room_h = x.size(2) + 2 * pads[0] - spread[0] * (kernel[0] - 1) - 1;
  const int64_t room_w = x.size(3) + 2 * pads[1] - spread[1] * (kernel[1] - 1) - 1;
  FASTRES_CHECK(room_h >= 0 && room_w >= 0, kOp, "the kernel", "no larger than the padded input",
                show({kernel_size.data(), kernel_size.size()}));
  FASTRES_CHECK(padded ? channels >= x.size(1) && spread[1] == 1 : channels == x.size(1) && is_dense(x, Format::channels_last),
                kOp, "x", "dense in channels_last, of " << channels << " channels", show(x.sizes()));
  const char* lack = groups == 1 ? nullptr : groups_lack(channels, out_channels, groups, size);
  FASTRES_CHECK(lack == nullptr && (groups == 1 || (!padded && !winograd)), kOp, "groups",
                "1, or " << (lack == nullptr ? "of a direct convolution" : lack), groups);
  const int64_t taps_w = padded ? 1 : kernel[1], run = channels / groups * size / kWordBytes * (padded ? kernel[1] : 1);
  FASTRES_CHECK(channels * size % kWordBytes == 0 && run <= kConvMostRun, kOp, "channels",
                "whole words of 32 bits, at most " << kConvMostRun << " to a tap", channels);
  const int64_t depth = winograd ? kWinogradPoints * channels : kernel[0] * taps_w * run;
  FASTRES_CHECK(bias.is_cpu() && bias.scalar_type() == ScalarType::Float && bias.is_contiguous() && out_channels > 0, kOp,
                "bias", "contiguous float32 on cpu, a value for each output channel", show(bias.sizes()));
  FASTRES_CHECK(weight.is_cpu() && weight.scalar_type() == x.scalar_type() && weight.is_contiguous() &&
                    weight.numel() * size == packed_words(out_channels, depth, groups) * kWordBytes,
                kOp, "weight", "packed for this convolution, of x's dtype", show(weight.sizes()));
  FASTRES_CHECK(!winograd || (dtype == DType::kFloat32 && !padded && kernel == Pair{3, 3} && by == Pair{1, 1} &&
                              spread == Pair{1, 1} && channels % conv_tile().lanes == 0),
                kOp, "a convolution by Winograd", "3x3, stride 1, float32, of channels in whole vectors", channels);
  Tensor y = empty_activation(std::array{x.size(0), out_channels, room_h / by[0] + 1, room_w / by[1] + 1},
                              Format::channels_last, x);
  if (residual) {
    check_like(kOp, "residual", *residual, y);
    FASTRES_CHECK(is_dense(*residual, Format::channels_last), kOp, "residual", "dense in channels_last",
                  "strides " << show(residual->strides()));
  }
  const int64_t height = x.size(2) + (padded ? 2 * pads[0] : 0), width = x.size(3) + (padded ? 2 * pads[1] : 0);
  Tensor source = x;
  if (padded) {
    source = empty_activation(std::array{x.size(0), height, width, channels}, Format::contiguous, x);
    run_pad({size, x.data_ptr(), source.data_ptr(), x.size(0), x.size(1), x.size(2), x.size(3), x.stride(0), x.stride(1),
             x.stride(2), x.stride(3), channels, pads[0], pads[1]});
  }
  const int64_t pixel_step = channels * size;
  const ConvArgs args{.dtype = dtype, .act = act_of(kOp, act),
            .stream = should_stream(y.numel(), dtype) && out_channels % conv_tile().lanes == 0,
            .x = source.data_ptr(), .weight = weight.data_ptr(), .bias = static_cast<const float*>(bias.data_ptr()),
            .residual = residual ? residual->data_ptr() : nullptr, .y = y.data_ptr(), .images = x.size(0),
            .height = height, .width = width, .image_step = height * width * pixel_step, .row_step = width * pixel_step,
            .pixel_step = pixel_step, .out_h = y.size(2), .out_w = y.size(3), .out_channels = out_channels,
            .out_step = out_channels, .kernel_h = kernel[0], .kernel_w = taps_w, .stride_h = by[0], .stride_w = by[1],
            .pad_h = padded ? 0 : pads[0], .pad_w = padded ? 0 : pads[1], .dilation_h = spread[0],
            .dilation_w = spread[1], .run = run, .dense = false, .share_channels = false, .block = 0};
  if (winograd) run_winograd(args);
  else if (groups > 1) run_now(grouped_work(args, groups, torch::stable::get_num_threads()));
  else run_conv(args);
  return y;
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_conv_bn_act(Tensor x, Tensor? residual, Tensor weight, Tensor bias, int[] kernel_size, int[] stride, "
        "int[] padding, int[] dilation, int groups, int channels, bool padded, bool winograd, str act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_conv_bn_act", TORCH_BOX(&fastres::cpu::conv_bn_act));
}
