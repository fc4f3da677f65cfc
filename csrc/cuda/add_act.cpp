// Binding of add_act: checks, output, launch, registration.
#include "cuda/add_act.h"

#include "cuda/host.h"

namespace fastres::cuda {
namespace {

void check_pair(const char* op, Named first, Named second) {
  check_cuda(op, first.param, first.tensor);
  fastres::check_pair(op, first, second, false);
}

Tensor run(const char* op, cudaError_t (*launcher)(const AddActParams&, cudaStream_t), const Tensor& a, const Tensor& b,
           const Text& act) {
  const bool relu = is_relu(op, act);
  const Launch launch(op, a);
  Tensor out = empty_like_strided(a);
  launch(launcher, {dtype_of(a), relu, a.numel(), a.data_ptr(), b.data_ptr(), out.data_ptr()});
  return out;
}

Tensor add_act(const Tensor& x, const Tensor& residual, const Text& act) {
  check_pair("add_act", {"x", x}, {"residual", residual});
  return run("add_act", launch_add_act, x, residual, act);
}

Tensor add_act_backward(const Tensor& grad_y, const Tensor& y, const Text& act) {
  check_pair("add_act_backward", {"grad_y", grad_y}, {"y", y});
  return run("add_act_backward", launch_add_act_backward, grad_y, y, act);
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_add_act(Tensor x, Tensor residual, str act) -> Tensor");
  m.def("cuda_add_act_backward(Tensor grad_y, Tensor y, str act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_add_act", TORCH_BOX(&fastres::cuda::add_act));
  m.impl("cuda_add_act_backward", TORCH_BOX(&fastres::cuda::add_act_backward));
}
