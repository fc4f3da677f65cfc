// Binding of bn_add_bn_act: evaluation, training and backward. Each of the two batch norms is a call of its own.
#include "cpu/bn_add_bn_act.h"

#include "cpu/bn.h"

namespace fastres::cpu {
namespace {

Tensor apply(BnCall& call, BnCall& shortcut) {
  Tensor y = empty_output(call.x.sizes(), call.format, call.x);
  call.fill_tables();
  shortcut.fill_tables();
  call.args.out = y.data_ptr();
  const BnAddBnActArgs args{call.args, shortcut.args};
  call.run_rows([&](const BnArgs&, int64_t begin, int64_t end) { bn_add_bn_act_forward(args, begin, end); });
  return y;
}

Tensor bn_add_bn_act(const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& mean, const Tensor& var, double eps, const OptionalTensor& residual_weight,
                     const OptionalTensor& residual_bias, const Tensor& residual_mean, const Tensor& residual_var,
                     double residual_eps, const Text& act) {
  BnCall call("bn_add_bn_act", {{"x", x}, {"residual", residual}}, act);
  BnCall shortcut("bn_add_bn_act", {{"residual", residual}, {"x", x}}, act);
  call.read_affine(weight, bias);
  shortcut.read_affine(residual_weight, residual_bias);
  call.read_statistics(mean, var, eps);
  shortcut.read_statistics(residual_mean, residual_var, residual_eps);
  return apply(call, shortcut);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act_train(
    const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, double residual_eps,
    const Text& act) {
  BnCall call("bn_add_bn_act_train", {{"x", x}, {"residual", residual}}, act);
  BnCall shortcut("bn_add_bn_act_train", {{"residual", residual}, {"x", x}}, act);
  call.read_affine(weight, bias);
  shortcut.read_affine(residual_weight, residual_bias);
  const Statistics own = batch_statistics(call, eps), other = batch_statistics(shortcut, residual_eps);
  const Tensor mask = call.empty_mask();
  return {apply(call, shortcut), own.mean, own.var, other.mean, other.var, mask};
}

// dz, the gradient behind the activation, is left where the residual's gradient will be: the same element is read before it
// is written.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bn_add_bn_act_backward(
    const Tensor& grad_y, const OptionalTensor& grad_y2, const Tensor& mask, const Tensor& x, const Tensor& residual,
    const OptionalTensor& weight, const Tensor& mean, const Tensor& var, double eps, const OptionalTensor& residual_weight,
    const Tensor& residual_mean, const Tensor& residual_var, double residual_eps, const Text& act) {
  const char* op = "bn_add_bn_act_backward";
  const Tensor& second = grad_y2 ? *grad_y2 : grad_y;  // where there is none, grad_y is checked twice, and counted once less
  BnCall call(op, {{"x", x}, {"grad_y", grad_y}, {"residual", residual}, {"grad_y2", second}}, act, grad_y2 ? 2 : 1);
  BnCall shortcut(op, {{"residual", residual}, {"x", x}}, "none");
  call.read_mask(mask);
  call.read_affine(weight, std::nullopt);
  shortcut.read_affine(residual_weight, std::nullopt);
  call.read_statistics(mean, var, eps);
  shortcut.read_statistics(residual_mean, residual_var, residual_eps);
  Tensor grad_x = empty_output(x.sizes(), call.format, x);
  Tensor grad_residual = empty_output(x.sizes(), call.format, x);
  for (BnCall* each : {&call, &shortcut}) {
    each->fill_tables();
    each->args.training = true;
  }
  call.args.grad_y = grad_y.data_ptr();
  call.args.grad_y2 = grad_y2 ? grad_y2->data_ptr() : nullptr;
  call.args.grad_residual = grad_residual.data_ptr();
  shortcut.args.grad_y = grad_residual.data_ptr();
  call.reduce(bn_add_act_sums);
  shortcut.reduce(bn_act_sums);
  const ParameterGradients own = parameter_gradients(call, mean, weight, std::nullopt);
  const ParameterGradients other = parameter_gradients(shortcut, residual_mean, residual_weight, std::nullopt);
  call.args.out = grad_x.data_ptr();
  shortcut.args.out = grad_residual.data_ptr();
  call.args.grad_y = grad_residual.data_ptr();
  call.args.act = Act::kNone;
  call.run_rows(bn_act_gradient);
  shortcut.run_rows(bn_act_gradient);
  return {grad_x, grad_residual, own.weight, own.bias, other.weight, other.bias};
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_bn_add_bn_act(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
        "Tensor? residual_weight, Tensor? residual_bias, Tensor residual_mean, Tensor residual_var, float residual_eps, "
        "str act) -> Tensor");
  m.def("cpu_bn_add_bn_act_train(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, "
        "Tensor? residual_weight, Tensor? residual_bias, float residual_eps, str act) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_bn_add_bn_act_backward(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor residual, "
        "Tensor? weight, Tensor mean, Tensor var, float eps, Tensor? residual_weight, Tensor residual_mean, "
        "Tensor residual_var, float residual_eps, str act) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_bn_add_bn_act", TORCH_BOX(&fastres::cpu::bn_add_bn_act));
  m.impl("cpu_bn_add_bn_act_train", TORCH_BOX(&fastres::cpu::bn_add_bn_act_train));
  m.impl("cpu_bn_add_bn_act_backward", TORCH_BOX(&fastres::cpu::bn_add_bn_act_backward));
}
