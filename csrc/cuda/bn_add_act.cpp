// Bindings of bn_add_act, bn_add_act_train and bn_add_act_backward: checks, outputs, launches, registration.
#include "cuda/bn_add_act.h"

#include "cuda/bn_add_act_backward.h"
#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

Tensor normalise(const Launch& launch, const BnGeometry& geometry, const Tensor& x, const Tensor& residual,
                 const BnArguments& args, double eps, bool relu, uint8_t* mask) {
  Tensor y = empty_like_activation(x);
  launch(launch_bn_add_act,
         BnAddActParams{geometry, dtype_of(x), relu, static_cast<float>(eps), x.data_ptr(), residual.data_ptr(), y.data_ptr(),
                        args.weight, args.bias, args.mean, args.var, mask});
  return y;
}

Tensor bn_add_act(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                  const Tensor& mean, const Tensor& var, double eps, const Text& act) {
  const char* op = "bn_add_act";
  const BnGeometry geometry = divide(op, {{"x", x}, {"residual", residual}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  return normalise(launch, geometry, x, residual, args, eps, relu, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_train(const Tensor& x, const Tensor& residual,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            double eps, const Text& act) {
  const char* op = "bn_add_act_train";
  const BnGeometry geometry = divide(op, {{"x", x}, {"residual", residual}});
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const Statistics found = batch_statistics(launch, geometry, x);
  const BnArguments args(op, x, weight, bias, found.mean, found.var);
  const Tensor mask = empty_mask(x, relu);
  const BnGeometry masked = relu ? divide_masked(op, {{"x", x}, {"residual", residual}}) : geometry;
  return {normalise(launch, masked, x, residual, args, eps, relu, mask_data(mask, relu)), found.mean, found.var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward(const Tensor& grad_y, const OptionalTensor& grad_y2,
                                                               const Tensor& mask, const Tensor& x,
                                                               const OptionalTensor& weight, const Tensor& mean,
                                                               const Tensor& var, double eps, const Text& act) {
  const char* op = "bn_add_act_backward";
  const BnGeometry geometry = divide(op, {{"x", x}, {"grad_y", grad_y}, {"grad_y2", grad_y2 ? *grad_y2 : grad_y}});
  const bool relu = is_relu(op, act);
  check_mask(op, mask, x, relu);
  const Launch launch(op, x);
  Tensor grad_residual = empty_like_activation(x);
  BnAddActBackwardParams params{};
  params.geometry = geometry;
  params.relu = relu;
  params.training = true;
  params.eps = static_cast<float>(eps);
  params.grad_y = grad_y.data_ptr();
  params.grad_y2 = grad_y2 ? grad_y2->data_ptr() : nullptr;
  params.mask = mask_data(mask, relu);
  params.grad_residual = grad_residual.data_ptr();
  const BnArguments args(op, x, weight, std::nullopt, mean, var);
  const Gradients found = prepare_gradients(params, x, args);
  launch(launch_bn_add_act_backward, params);
  return {found.x, grad_residual, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_bn_add_act(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
        " str act) -> Tensor");
  m.def("cuda_bn_add_act_train(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str act)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cuda_bn_add_act_backward(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor? weight, Tensor mean,"
        " Tensor var, float eps, str act) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_bn_add_act", TORCH_BOX(&fastres::cuda::bn_add_act));
  m.impl("cuda_bn_add_act_train", TORCH_BOX(&fastres::cuda::bn_add_act_train));
  m.impl("cuda_bn_add_act_backward", TORCH_BOX(&fastres::cuda::bn_add_act_backward));
}
