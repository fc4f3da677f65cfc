// Bindings of what the batch norm behind conv_statistics asks for in training: the forward passes that write a ReLU's mask, with
// statistics given; and the pass that finds the statistics, which such a convolution spares.
#include "cuda/bn_add_act.h"
#include "cuda/bn_add_bn_act.h"
#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

std::tuple<Tensor, Tensor> bn_statistics(const Tensor& x) {
  const char* op = "bn_statistics";
  const BnGeometry geometry = divide(op, {{"x", x}});
  const Launch launch(op, x);
  const Statistics found = batch_statistics(launch, geometry, x);
  return {found.mean, found.var};
}

BnGeometry divide_for(const char* op, const Tensor& x, const Tensor& residual, bool relu) {
  const std::initializer_list<Named> both{{"x", x}, {"residual", residual}};
  return relu ? divide_masked(op, both) : divide(op, both);
}

BnActParams normalisation(const BnGeometry& geometry, const Tensor& x, const BnArguments& args, double eps, bool relu,
                          const Tensor& y, const Tensor& mask) {
  return {geometry,     dtype_of(x), relu,      static_cast<float>(eps), x.data_ptr(), nullptr,
          y.data_ptr(), args.weight, args.bias, args.mean,               args.var,     mask_data(mask, relu)};
}

std::tuple<Tensor, Tensor> bn_add_act_given(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                            const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps,
                                            const Text& act) {
  const char* op = "bn_add_act_train";
  const bool relu = is_relu(op, act);
  const BnGeometry geometry = divide_for(op, x, residual, relu);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  const Tensor y = empty_like_activation(x), mask = empty_mask(x, relu);
  BnAddActParams params = normalisation(geometry, x, args, eps, relu, y, mask);
  params.residual = residual.data_ptr();
  launch(launch_bn_add_act, params);
  return {y, mask};
}

std::tuple<Tensor, Tensor> bn_add_bn_act_given(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                               const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps,
                                               const OptionalTensor& residual_weight, const OptionalTensor& residual_bias,
                                               const Tensor& residual_mean, const Tensor& residual_var, double residual_eps,
                                               const Text& act) {
  const char* op = "bn_add_bn_act_train";
  const bool relu = is_relu(op, act);
  const BnGeometry geometry = divide_for(op, x, residual, relu);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  const BnArguments other{{op, "residual_weight", residual_weight, x},
                          {op, "residual_bias", residual_bias, x},
                          {op, "residual_mean", residual_mean, x},
                          {op, "residual_var", residual_var, x}};
  const Tensor y = empty_like_activation(x), mask = empty_mask(x, relu);
  launch(launch_bn_add_bn_act, BnAddBnActParams{normalisation(geometry, x, args, eps, relu, y, mask),
                                                normalisation(geometry, residual, other, residual_eps, relu, y, mask)});
  return {y, mask};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("bn_statistics(Tensor x) -> (Tensor, Tensor)");
  m.def("bn_add_act_given(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps,"
        " str act) -> (Tensor, Tensor)");
  m.def("bn_add_bn_act_given(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
        " float eps, Tensor? residual_weight, Tensor? residual_bias, Tensor residual_mean, Tensor residual_var,"
        " float residual_eps, str act) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("bn_statistics", TORCH_BOX(&fastres::cuda::bn_statistics));
  m.impl("bn_add_act_given", TORCH_BOX(&fastres::cuda::bn_add_act_given));
  m.impl("bn_add_bn_act_given", TORCH_BOX(&fastres::cuda::bn_add_bn_act_given));
}
