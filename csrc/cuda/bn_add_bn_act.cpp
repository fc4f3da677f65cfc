// Bindings of bn_add_bn_act, bn_add_bn_act_train and bn_add_bn_act_backward: checks, outputs, launches, registration.
#include "cuda/bn_add_bn_act.h"

#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

// The parameters of the shortcut's normalisation, under their own names.
BnArguments residual_arguments(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                               const OptionalTensor& mean, const OptionalTensor& var) {
  return {{op, "residual_weight", weight, x}, {op, "residual_bias", bias, x}, {op, "residual_mean", mean, x},
          {op, "residual_var", var, x}};
}

Tensor normalise(const Launch& launch, const BnGeometry& geometry, const Tensor& x, const Tensor& residual,
                 const BnArguments& args, double eps, const BnArguments& residual_args, double residual_eps, bool relu,
                 uint8_t* mask) {
  Tensor y = empty_like_activation(x);
  const auto params = [&](const Tensor& input, const BnArguments& of, double eps_of) {
    return BnActParams{geometry,     dtype_of(x), relu,    static_cast<float>(eps_of), input.data_ptr(), nullptr,
                       y.data_ptr(), of.weight,   of.bias, of.mean,                    of.var,         mask};
  };
  launch(launch_bn_add_bn_act, BnAddBnActParams{params(x, args, eps), params(residual, residual_args, residual_eps)});
  return y;
}

Tensor bn_add_bn_act(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& mean, const Tensor& var, double eps, const OptionalTensor& residual_weight,
                     const OptionalTensor& residual_bias, const Tensor& residual_mean, const Tensor& residual_var,
                     double residual_eps, const Text& act) {
  const char* op = "bn_add_bn_act";
  const BnGeometry geometry = divide(op, {{"x", x}, {"residual", residual}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  const BnArguments other = residual_arguments(op, x, residual_weight, residual_bias, residual_mean, residual_var);
  return normalise(launch, geometry, x, residual, args, eps, other, residual_eps, relu, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act_train(
    const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, double residual_eps,
    const Text& act) {
  const char* op = "bn_add_bn_act_train";
  const BnGeometry geometry = divide(op, {{"x", x}, {"residual", residual}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const Statistics own = batch_statistics(launch, geometry, x), other = batch_statistics(launch, geometry, residual);
  const BnArguments args(op, x, weight, bias, own.mean, own.var);
  const BnArguments residual_args = residual_arguments(op, x, residual_weight, residual_bias, other.mean, other.var);
  const Tensor mask = empty_mask(x, relu);
  const BnGeometry masked = relu ? divide_masked(op, {{"x", x}, {"residual", residual}}) : geometry;
  const Tensor y = normalise(launch, masked, x, residual, args, eps, residual_args, residual_eps, relu, mask_data(mask, relu));
  return {y, own.mean, own.var, other.mean, other.var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act_backward(
    const Tensor& grad_y, const OptionalTensor& grad_y2, const Tensor& mask, const Tensor& x, const Tensor& residual,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& var, double eps, const OptionalTensor& residual_weight,
    const Tensor& residual_mean, const Tensor& residual_var, double residual_eps, const Text& act) {
  const char* op = "bn_add_bn_act_backward";
  const Tensor& second = grad_y2 ? *grad_y2 : grad_y;
  const BnGeometry geometry = divide(op, {{"x", x}, {"grad_y", grad_y}, {"residual", residual}, {"grad_y2", second}});
  const bool relu = is_relu(op, act);
  check_mask(op, mask, x, relu);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, std::nullopt, mean, var);
  const BnArguments other = residual_arguments(op, x, residual_weight, std::nullopt, residual_mean, residual_var);
  BnAddBnActBackwardParams params{};
  params.bn.geometry = geometry;
  params.bn.relu = relu;
  params.bn.training = true;
  params.bn.grad_y = grad_y.data_ptr();
  params.bn.grad_y2 = grad_y2 ? grad_y2->data_ptr() : nullptr;
  params.bn.mask = mask_data(mask, relu);
  params.residual = params.bn;
  params.bn.eps = static_cast<float>(eps);
  params.residual.eps = static_cast<float>(residual_eps);
  const Gradients found = prepare_gradients(params.bn, x, args);
  const Gradients of_residual = prepare_gradients(params.residual, residual, other);
  launch(launch_bn_add_bn_act_backward, params);
  return {found.x, of_residual.x, found.weight, found.bias, of_residual.weight, of_residual.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_bn_add_bn_act(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
        " Tensor? residual_weight, Tensor? residual_bias, Tensor residual_mean, Tensor residual_var, float residual_eps,"
        " str act) -> Tensor");
  m.def("cuda_bn_add_bn_act_train(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps,"
        " Tensor? residual_weight, Tensor? residual_bias, float residual_eps, str act)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_bn_add_bn_act_backward(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor residual, Tensor? weight,"
        " Tensor mean, Tensor var, float eps, Tensor? residual_weight, Tensor residual_mean, Tensor residual_var,"
        " float residual_eps, str act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_bn_add_bn_act", TORCH_BOX(&fastres::cuda::bn_add_bn_act));
  m.impl("cuda_bn_add_bn_act_train", TORCH_BOX(&fastres::cuda::bn_add_bn_act_train));
  m.impl("cuda_bn_add_bn_act_backward", TORCH_BOX(&fastres::cuda::bn_add_bn_act_backward));
}
