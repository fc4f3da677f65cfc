// Binding of bn_add_act: evaluation, training and backward.
#include "cpu/bn.h"

namespace fastres::cpu {
namespace {

Tensor apply(BnCall& call, const Tensor& residual) {
  Tensor y = empty_output(call.x.sizes(), call.format, call.x);
  call.fill_tables();
  call.args.residual = residual.data_ptr();
  call.args.out = y.data_ptr();
  call.run_rows(bn_add_act_forward);
  return y;
}

Tensor bn_add_act(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                  const Tensor& mean, const Tensor& var, double eps, const Text& act) {
  BnCall call("bn_add_act", {{"x", x}, {"residual", residual}}, act);
  call.read_affine(weight, bias);
  call.read_statistics(mean, var, eps);
  return apply(call, residual);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_train(const Tensor& x, const Tensor& residual,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            double eps, const Text& act) {
  BnCall call("bn_add_act_train", {{"x", x}, {"residual", residual}}, act);
  call.read_affine(weight, bias);
  const Statistics statistics = batch_statistics(call, eps);
  const Tensor mask = call.empty_mask();
  return {apply(call, residual), statistics.mean, statistics.var, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward(const Tensor& grad_y, const OptionalTensor& grad_y2,
                                                               const Tensor& mask, const Tensor& x,
                                                               const OptionalTensor& weight, const Tensor& mean,
                                                               const Tensor& var, double eps, const Text& act) {
  const Tensor& second = grad_y2 ? *grad_y2 : grad_y;  // where there is none, grad_y is checked twice, and counted once less
  BnCall call("bn_add_act_backward", {{"x", x}, {"grad_y", grad_y}, {"grad_y2", second}}, act, grad_y2 ? 2 : 1);
  call.read_mask(mask);
  call.read_affine(weight, std::nullopt);
  call.read_statistics(mean, var, eps);
  call.fill_tables();
  call.args.training = true;
  call.args.grad_y = grad_y.data_ptr();
  call.args.grad_y2 = grad_y2 ? grad_y2->data_ptr() : nullptr;
  Tensor grad_residual = empty_output(x.sizes(), call.format, x);
  call.args.grad_residual = grad_residual.data_ptr();
  call.reduce(bn_add_act_sums);
  const ParameterGradients grads = parameter_gradients(call, mean, weight, std::nullopt);
  Tensor grad_x = empty_output(x.sizes(), call.format, x);
  call.args.out = grad_x.data_ptr();
  call.args.grad_y = grad_residual.data_ptr();  // which is dz
  call.args.act = Act::kNone;
  call.run_rows(bn_act_gradient);
  return {grad_x, grad_residual, grads.weight, grads.bias};
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_bn_add_act(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
        "str act) -> Tensor");
  m.def("cpu_bn_add_act_train(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str act) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_bn_add_act_backward(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor? weight, Tensor mean, "
        "Tensor var, float eps, str act) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_bn_add_act", TORCH_BOX(&fastres::cpu::bn_add_act));
  m.impl("cpu_bn_add_act_train", TORCH_BOX(&fastres::cpu::bn_add_act_train));
  m.impl("cpu_bn_add_act_backward", TORCH_BOX(&fastres::cpu::bn_add_act_backward));
}
