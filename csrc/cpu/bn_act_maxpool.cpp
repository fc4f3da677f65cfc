// Binding of bn_act_maxpool: evaluation, training and backward.
#include "cpu/bn_act_maxpool.h"

#include "binding/window.h"
#include "cpu/bn.h"

namespace fastres::cpu {
namespace {

BnActMaxpoolArgs pool_args(BnCall& call, const PoolWindow& window) {
  const auto& [kernel, stride, padding, out] = window;
  const bool last = call.args.channels_last;
  const int64_t n = call.x.size(0), c = call.x.size(1), pixel = last ? c : 1;
  const int64_t phase_size = (call.x.size(3) + 2 * padding[1] + stride[1] - 1) / stride[1] * pixel;
  int64_t* offsets = call.scratch.take<int64_t>(kernel[1]);
  for (int64_t q = 0; q < kernel[1]; ++q) offsets[q] = q % stride[1] * phase_size + q / stride[1] * pixel;
  return {.bn = call.args,
          .stream_y = should_stream(n * c * out[0] * out[1], call.args.dtype),
          .images = last ? n : n * c,
          .pixel = pixel,
          .in_h = call.x.size(2),
          .in_w = call.x.size(3),
          .out_h = out[0],
          .out_w = out[1],
          .kernel_h = kernel[0],
          .kernel_w = kernel[1],
          .stride_h = stride[0],
          .stride_w = stride[1],
          .pad_h = padding[0],
          .pad_w = padding[1],
          .taps = nullptr,
          .phase_size = phase_size,
          .line_size = stride[1] * phase_size + kColsMultiple,
          .tap_offsets = offsets};
}

PoolWindow check_window(const BnCall& call, const Ints& kernel, const Ints& stride, const Ints& padding) {
  return fastres::check_window(call.op, call.x, kernel, stride, padding, kNoTap - 1);
}

// Runs the kernel over the rows of all images, `row_size` elements each.
template <typename Kernel>
void run_rows(Kernel kernel, const BnActMaxpoolArgs& args, int64_t rows_per_image, int64_t row_size) {
  const int64_t grain = std::max<int64_t>(1, kGrain / row_size);
  parallel_for(0, args.images * rows_per_image, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

Tensor apply(BnCall& call, const BnActMaxpoolArgs& args) {
  Tensor y = empty_output(std::array{call.x.size(0), call.x.size(1), args.out_h, args.out_w}, call.format, call.x);
  call.fill_tables();
  call.args.out = y.data_ptr();
  run_rows(bn_act_maxpool_forward, args, args.out_h, args.stride_h * args.in_w * args.pixel);
  return y;
}

Tensor bn_act_maxpool(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                      const Tensor& var, double eps, const Text& act, const Ints& kernel_size, const Ints& stride,
                      const Ints& padding) {
  BnCall call("bn_act_maxpool", {{"x", x}}, act, 1, true);
  const BnActMaxpoolArgs args = pool_args(call, check_window(call, kernel_size, stride, padding));
  call.read_affine(weight, bias);
  call.read_statistics(mean, var, eps);
  return apply(call, args);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_train(const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps, const Text& act,
                                                        const Ints& kernel_size, const Ints& stride,
                                                        const Ints& padding) {
  BnCall call("bn_act_maxpool_train", {{"x", x}}, act, 1, true);
  const BnActMaxpoolArgs args = pool_args(call, check_window(call, kernel_size, stride, padding));
  call.read_affine(weight, bias);
  const Statistics statistics = batch_statistics(call, eps);
  return {apply(call, args), statistics.mean, statistics.var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var, double eps,
                                                           const Text& act, bool training,
                                                           const Ints& kernel_size, const Ints& stride,
                                                           const Ints& padding) {
  BnCall call("bn_act_maxpool_backward", {{"x", x}}, act, 1, true);
  const PoolWindow window = check_window(call, kernel_size, stride, padding);
  BnActMaxpoolArgs args = pool_args(call, window);
  check_pooled(call.op, "grad_y", grad_y, x, window, call.format);
  call.read_affine(weight, bias);
  call.read_statistics(mean, var, eps);
  call.fill_tables();
  call.args.training = training;
  call.args.grad_y = grad_y.data_ptr();
  args.taps = call.scratch.take<uint16_t>(grad_y.numel());
  call.reduce([&](const BnArgs&, int64_t begin, int64_t end) { bn_act_maxpool_sums(args, begin, end); });
  const ParameterGradients grads = parameter_gradients(call, mean, weight, bias);
  Tensor grad_x = empty_output(x.sizes(), call.format, x);
  call.args.out = grad_x.data_ptr();
  run_rows(bn_act_maxpool_gradient, args, args.in_h, args.in_w * args.pixel);
  return {grad_x, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act, "
        "int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def("cpu_bn_act_maxpool_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act, int[] kernel_size, "
        "int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
        "float eps, str act, bool training, int[] kernel_size, int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_bn_act_maxpool", TORCH_BOX(&fastres::cpu::bn_act_maxpool));
  m.impl("cpu_bn_act_maxpool_train", TORCH_BOX(&fastres::cpu::bn_act_maxpool_train));
  m.impl("cpu_bn_act_maxpool_backward", TORCH_BOX(&fastres::cpu::bn_act_maxpool_backward));
}
