// Bindings of the batch norms in training, and of their backward, that read x once: checks, outputs, launches, registration.
#include "cuda/bn_cluster.h"

#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

// Checks the activations, x first, and divides x among clusters, which hold so many of them.
BnClusterPlan divide_among_clusters(const char* op, std::initializer_list<Named> activations, int held) {
  const Tensor& x = activations.begin()->tensor;
  check_cuda(op, activations.begin()->param, x);
  const Format format = check_activations(op, activations, false);
  FASTRES_CHECK(format == Format::channels_last && x.size(1) % kClusterVec == 0, op, "x",
                "channels_last, of a multiple of " << kClusterVec << " channels",
                show(x.sizes()) << " with strides " << show(x.strides()));
  for (const auto& [param, tensor] : activations)
    FASTRES_CHECK(is_aligned(tensor.data_ptr()), op, param, "aligned to 16 bytes", tensor.data_ptr());
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  const BnClusterPlan plan =
      bn_cluster_plan(rows, x.size(1), held * kClusterVec * static_cast<int>(element_size(dtype_of(x))));
  FASTRES_CHECK(plan.slots > 0, op, "x", "of so few pixels that a cluster's shared memory holds a slice of them", rows);
  FASTRES_CHECK(plan.blocks() < int64_t{1} << 31, op, "x", "of fewer channels", x.size(1));
  return plan;
}

struct Trained {
  Tensor y, mean, var, mask;
};

Trained train(const char* op, const Tensor& x, const Tensor* residual, const OptionalTensor& weight,
              const OptionalTensor& bias, double eps, const Text& act) {
  const bool relu = is_relu(op, act);
  const BnClusterPlan plan = residual == nullptr ? divide_among_clusters(op, {{"x", x}}, 1)
                                                 : divide_among_clusters(op, {{"x", x}, {"residual", *residual}}, 1);
  const Launch launch(op, x);
  const ChannelArgument own_weight(op, "weight", weight, x), own_bias(op, "bias", bias, x);
  const Trained out{empty_like_activation(x), empty_vector(x.size(1), ScalarType::Float, x),
                    empty_vector(x.size(1), ScalarType::Float, x), empty_mask(x, relu && residual != nullptr)};
  BnClusterParams params{};
  params.plan = plan;
  params.bn.dtype = dtype_of(x);
  params.bn.relu = relu;
  params.bn.eps = static_cast<float>(eps);
  params.bn.x = x.data_ptr();
  params.bn.residual = residual == nullptr ? nullptr : residual->data_ptr();
  params.bn.y = out.y.data_ptr();
  params.bn.weight = own_weight;
  params.bn.bias = own_bias;
  params.bn.mask = mask_data(out.mask, relu && residual != nullptr);
  params.mean = static_cast<float*>(out.mean.data_ptr());
  params.var = static_cast<float*>(out.var.data_ptr());
  launch(launch_bn_cluster, params);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                                double eps, const Text& act) {
  const Trained out = train("bn_act_train", x, nullptr, weight, bias, eps, act);
  return {out.y, out.mean, out.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_train(const Tensor& x, const Tensor& residual,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            double eps, const Text& act) {
  const Trained out = train("bn_add_act_train", x, &residual, weight, bias, eps, act);
  return {out.y, out.mean, out.var, out.mask};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_backward(const Tensor& grad_y, const Tensor& x, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
                                                   double eps, const Text& act, bool training) {
  const char* op = "bn_act_backward";
  FASTRES_CHECK(training, op, "training", "True", "False");
  BnClusterBackwardParams params{};
  params.plan = divide_among_clusters(op, {{"x", x}, {"grad_y", grad_y}}, 2);
  params.bn.relu = is_relu(op, act);
  const Launch launch(op, x);
  params.bn.eps = static_cast<float>(eps);
  params.bn.grad_y = grad_y.data_ptr();
  const BnArguments args(op, x, weight, bias, mean, var);
  const Gradients found = prepare_gradients(params.bn, x, args);
  launch(launch_bn_cluster_backward, params);
  return {found.x, found.weight, found.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_add_act_backward(const Tensor& grad_y, const OptionalTensor& grad_y2,
                                                               const Tensor& mask, const Tensor& x,
                                                               const OptionalTensor& weight, const Tensor& mean,
                                                               const Tensor& var, double eps, const Text& act) {
  const char* op = "bn_add_act_backward";
  BnClusterBackwardParams params{};
  params.plan = divide_among_clusters(op, {{"x", x}, {"grad_y", grad_y}, {"grad_y2", grad_y2 ? *grad_y2 : grad_y}}, 2);
  params.bn.relu = is_relu(op, act);
  check_mask(op, mask, x, params.bn.relu);
  const Launch launch(op, x);
  const Tensor grad_residual = empty_like_activation(x);
  params.bn.eps = static_cast<float>(eps);
  params.bn.grad_y = grad_y.data_ptr();
  params.bn.grad_y2 = grad_y2 ? grad_y2->data_ptr() : nullptr;
  params.bn.mask = mask_data(mask, params.bn.relu);
  params.bn.grad_residual = grad_residual.data_ptr();
  const BnArguments args(op, x, weight, std::nullopt, mean, var);
  const Gradients found = prepare_gradients(params.bn, x, args);
  launch(launch_bn_cluster_backward, params);
  return {found.x, grad_residual, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cluster_bn_act_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act) -> (Tensor, Tensor, Tensor)");
  m.def("cluster_bn_add_act_train(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, str act)"
        " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("cluster_bn_act_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
        " str act, bool training) -> (Tensor, Tensor, Tensor)");
  m.def("cluster_bn_add_act_backward(Tensor grad_y, Tensor? grad_y2, Tensor mask, Tensor x, Tensor? weight, Tensor mean,"
        " Tensor var, float eps, str act) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cluster_bn_act_train", TORCH_BOX(&fastres::cuda::bn_act_train));
  m.impl("cluster_bn_add_act_train", TORCH_BOX(&fastres::cuda::bn_add_act_train));
  m.impl("cluster_bn_act_backward", TORCH_BOX(&fastres::cuda::bn_act_backward));
  m.impl("cluster_bn_add_act_backward", TORCH_BOX(&fastres::cuda::bn_add_act_backward));
}
