// Bindings of bn_act_maxpool, bn_act_maxpool_train and bn_act_maxpool_backward: checks, outputs, launches, registration.
#include "cuda/bn_act_maxpool.h"

#include "binding/window.h"
#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

// Checks x and the window. Kernels count rows and columns in 32 bits, elements in 64.
PoolWindow check_call(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding) {
  check_cuda(op, "x", x);
  check_activations(op, {{"x", x}}, false);
  FASTRES_CHECK(x.size(2) < (int64_t{1} << 30) / x.size(3), op, "x", "of planes below 2^30 elements", show(x.sizes()));
  return check_window(op, x, kernel, stride, padding, kNoTap - 1);
}

Pool pool_of(const Tensor& x, const PoolWindow& window) {
  const auto pair = [](int64_t h, int64_t w) { return PlaneSize{static_cast<int>(h), static_cast<int>(w)}; };
  const auto step = [](int64_t value) { return std::min<int64_t>(value, 1 << 30); };  // beyond the plane all are alike
  return {pair(x.size(2), x.size(3)), pair(window.out[0], window.out[1]), pair(window.kernel[0], window.kernel[1]),
          pair(step(window.stride[0]), step(window.stride[1])), pair(window.padding[0], window.padding[1])};
}

// Divides a plane's pixels among blocks as those of x, or of what it is pooled to; vectors need all pointers aligned.
BnGeometry divide(const Tensor& x, int64_t plane, std::initializer_list<const void*> pointers) {
  const bool channels_last = memory_format(x) == Format::channels_last;
  const bool vectors = channels_last && std::all_of(pointers.begin(), pointers.end(), is_aligned);
  return bn_geometry(vector_of(x), channels_last, vectors, x.size(0), x.size(1), plane);
}

Tensor apply(const Launch& launch, const Tensor& x, const PoolWindow& window, const BnArguments& args, double eps,
             bool relu) {
  Tensor y = empty_activation(pooled_sizes(x, window), memory_format(x), x);
  const BnGeometry geometry = divide(x, window.out[0] * window.out[1], {x.data_ptr()});
  const BnActParams bn{geometry,     dtype_of(x), relu,      static_cast<float>(eps), x.data_ptr(), nullptr,
                       y.data_ptr(), args.weight, args.bias, args.mean,               args.var};
  launch(launch_bn_act_maxpool, BnActMaxpoolParams{bn, pool_of(x, window)});
  return y;
}

Tensor bn_act_maxpool(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                      const Tensor& var, double eps, const Text& act, const Ints& kernel_size, const Ints& stride,
                      const Ints& padding) {
  const char* op = "bn_act_maxpool";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  return apply(launch, x, window, BnArguments(op, x, weight, bias, mean, var), eps, relu);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_train(const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps, const Text& act,
                                                        const Ints& kernel_size, const Ints& stride,
                                                        const Ints& padding) {
  const char* op = "bn_act_maxpool_train";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const Statistics found = batch_statistics(launch, fastres::cuda::divide(op, {{"x", x}}), x);
  const BnArguments args(op, x, weight, bias, found.mean, found.var);
  return {apply(launch, x, window, args, eps, relu), found.mean, found.var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var, double eps,
                                                           const Text& act, bool training,
                                                           const Ints& kernel_size, const Ints& stride,
                                                           const Ints& padding) {
  const char* op = "bn_act_maxpool_backward";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  check_pooled(op, "grad_y", grad_y, x, window, memory_format(x));
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  const Tensor taps = empty_vector(grad_y.numel(), ScalarType::Byte, x);
  BnActMaxpoolBackwardParams params{};
  params.pool = pool_of(x, window);
  params.taps = static_cast<uint8_t*>(taps.data_ptr());
  params.input = divide(x, x.size(2) * x.size(3), {x.data_ptr(), grad_y.data_ptr()});
  params.bn.geometry = divide(x, window.out[0] * window.out[1], {x.data_ptr(), grad_y.data_ptr()});
  params.bn.geometry.elements = params.input.elements;
  params.bn.relu = relu;
  params.bn.training = training;
  params.bn.eps = static_cast<float>(eps);
  params.bn.grad_y = grad_y.data_ptr();
  const Gradients found = prepare_gradients(params.bn, x, args);
  launch(launch_bn_act_maxpool_backward, params);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act,"
        " int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def("cuda_bn_act_maxpool_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act, int[] kernel_size,"
        " int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
        " float eps, str act, bool training, int[] kernel_size, int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_bn_act_maxpool", TORCH_BOX(&fastres::cuda::bn_act_maxpool));
  m.impl("cuda_bn_act_maxpool_train", TORCH_BOX(&fastres::cuda::bn_act_maxpool_train));
  m.impl("cuda_bn_act_maxpool_backward", TORCH_BOX(&fastres::cuda::bn_act_maxpool_backward));
}
