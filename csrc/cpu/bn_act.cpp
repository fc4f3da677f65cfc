// Binding of bn_act: evaluation, training and backward.
#include "cpu/bn.h"

namespace fastres::cpu {
namespace {

Tensor apply(BnCall& call) {
  Tensor y = empty_output(call.x.sizes(), call.format, call.x);
  call.fill_tables();
  call.args.out = y.data_ptr();
  call.run_rows(bn_act_forward);
  return y;
}

Tensor bn_act(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
              const Tensor& var, double eps, const Text& act) {
  BnCall call("bn_act", {{"x", x}}, act);
  call.read_affine(weight, bias);
  call.read_statistics(mean, var, eps);
  return apply(call);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(const Tensor& x, const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps, const Text& act) {
  BnCall call("bn_act_train", {{"x", x}}, act);
  call.read_affine(weight, bias);
  const Statistics statistics = batch_statistics(call, eps);
  return {apply(call), statistics.mean, statistics.var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps, const Text& act, bool training) {
  BnCall call("bn_act_backward", {{"x", x}, {"grad_y", grad_y}}, act);
  call.read_affine(weight, bias);
  call.read_statistics(mean, var, eps);
  call.fill_tables();
  call.args.training = training;
  call.args.grad_y = grad_y.data_ptr();
  call.reduce(bn_act_sums);
  const ParameterGradients grads = parameter_gradients(call, mean, weight, bias);
  Tensor grad_x = empty_output(x.sizes(), call.format, x);
  call.args.out = grad_x.data_ptr();
  call.run_rows(bn_act_gradient);
  return {grad_x, grads.weight, grads.bias};
}

// For each batch norm running = (1 - momentum) * running + momentum * batch, with the batch's biased var times `unbiased`; then
// each counter, if there are any, is advanced. Everything is checked before anything is written.
void bn_running_(const std::vector<Tensor>& running_mean, const std::vector<Tensor>& running_var,
                 const std::vector<Tensor>& counters, const std::vector<Tensor>& mean, const std::vector<Tensor>& var,
                 const std::vector<double>& momentum, const std::vector<double>& unbiased) {
  const char* op = "bn_running_";
  const size_t norms = running_mean.size();
  for (const size_t size : {running_var.size(), mean.size(), var.size(), momentum.size(), unbiased.size()})
    FASTRES_CHECK(size == norms, op, "every list", "as long as the others, " << norms, size);
  const auto check = [&](const char* param, const Tensor& running, const Tensor& batch) {
    for (const Tensor* t : {&running, &batch}) {
      check_cpu(op, param, *t);
      check_floating(op, param, *t, true);
    }
    FASTRES_CHECK(running.dim() == 1 && batch.dim() == 1 && running.size(0) == batch.size(0), op, param,
                  "one value a channel, as the batch's", show(running.sizes()));
  };
  const auto update = [&](const Tensor& running, const Tensor& batch, double momentum, double weight) {
    const Channels values = read_channels(batch.data_ptr(), batch.scalar_type(), batch.size(0), batch.stride(0));
    with_data(running.data_ptr(), running.scalar_type(), [&](auto* p) {
      for (size_t c = 0; c < values.size(); ++c) {
        auto& value = p[static_cast<int64_t>(c) * running.stride(0)];
        const double updated = (1 - momentum) * static_cast<double>(value) + weight * values[c];
        value = static_cast<std::remove_reference_t<decltype(value)>>(updated);
      }
    });
  };
  for (size_t i = 0; i < norms; ++i) {
    check("running_mean", running_mean[i], mean[i]);
    check("running_var", running_var[i], var[i]);
  }
  for (const Tensor& counter : counters) {
    check_cpu(op, "counter", counter);
    FASTRES_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 1, op, "counter", "one int64",
                  show(counter.sizes()));
  }
  for (size_t i = 0; i < norms; ++i) {
    update(running_mean[i], mean[i], momentum[i], momentum[i]);
    update(running_var[i], var[i], momentum[i], momentum[i] * unbiased[i]);
  }
  for (const Tensor& counter : counters) ++*static_cast<int64_t*>(counter.data_ptr());
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act) -> Tensor");
  m.def("cpu_bn_act_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
        "str act, bool training) -> (Tensor, Tensor, Tensor)");
  m.def("cpu_bn_running_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] counters, Tensor[] mean, "
        "Tensor[] var, float[] momentum, float[] unbiased) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_bn_act", TORCH_BOX(&fastres::cpu::bn_act));
  m.impl("cpu_bn_act_train", TORCH_BOX(&fastres::cpu::bn_act_train));
  m.impl("cpu_bn_act_backward", TORCH_BOX(&fastres::cpu::bn_act_backward));
  m.impl("cpu_bn_running_", TORCH_BOX(&fastres::cpu::bn_running_));
}
