// Bindings of bn_act, bn_act_train and bn_act_backward: checks, outputs, launches, registration.
#include "cuda/bn_act.h"

#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

Tensor normalise(const Launch& launch, const BnGeometry& geometry, const Tensor& x, const BnArguments& args, float eps,
                 bool relu) {
  Tensor y = empty_like_activation(x);
  launch(launch_bn_act, BnActParams{geometry, dtype_of(x), relu, eps, x.data_ptr(), nullptr, y.data_ptr(), args.weight,
                                    args.bias, args.mean, args.var});
  return y;
}

Tensor bn_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
              const Tensor& var, double eps, const Text& act) {
  const char* op = "bn_act";
  const BnGeometry geometry = divide(op, {{"x", x}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  return normalise(launch, geometry, x, args, static_cast<float>(eps), relu);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                double eps, const Text& act) {
  const char* op = "bn_act_train";
  const BnGeometry geometry = divide(op, {{"x", x}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const Statistics found = batch_statistics(launch, geometry, x);
  const BnArguments args(op, x, weight, bias, found.mean, found.var);
  return {normalise(launch, geometry, x, args, static_cast<float>(eps), relu), found.mean, found.var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps, const Text& act, bool training) {
  const char* op = "bn_act_backward";
  const BnGeometry geometry = divide(op, {{"x", x}, {"grad_y", grad_y}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  BnActBackwardParams params{};
  params.geometry = geometry;
  params.relu = relu;
  params.training = training;
  params.eps = static_cast<float>(eps);
  params.grad_y = grad_y.data_ptr();
  const BnArguments args(op, x, weight, bias, mean, var);
  const Gradients found = prepare_gradients(params, x, args);
  launch(launch_bn_act_backward, params);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act) -> Tensor");
  m.def("cuda_bn_act_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
        " str act, bool training) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_bn_act", TORCH_BOX(&fastres::cuda::bn_act));
  m.impl("cuda_bn_act_train", TORCH_BOX(&fastres::cuda::bn_act_train));
  m.impl("cuda_bn_act_backward", TORCH_BOX(&fastres::cuda::bn_act_backward));
}
