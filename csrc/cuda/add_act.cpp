// Binding of add_act: checks, output, launch, registration.
#include "cuda/add_act.h"

#include "cuda/host.h"

namespace fastres::cuda {
namespace {

// The second operand lies in memory as the first one does.
void check_pair(const char* op, Named first, Named second) {
  const Tensor &a = first.tensor, &b = second.tensor;
  check_cuda(op, first.param, a);
  check_floating(op, first.param, a, false);
  FASTRES_CHECK(a.numel() > 0, op, first.param, "not empty", show(a.sizes()));
  check_like(op, second.param, b, a);
  for (int64_t d = 0; d < a.dim(); ++d)
    FASTRES_CHECK(a.sizes()[d] == 1 || a.strides()[d] == b.strides()[d], op, second.param,
                  "of the strides of " << first.param << ", " << show(a.strides()), show(b.strides()));
  FASTRES_CHECK(is_non_overlapping_and_dense(a), op, first.param, "dense and without overlap",
                "strides " << show(a.strides()) << " for sizes " << show(a.sizes()));
}

Tensor run(const char* op, cudaError_t (*launcher)(const AddActParams&, cudaStream_t), const Tensor& a, const Tensor& b,
           const std::string& act) {
  const bool relu = is_relu(op, act);
  const Launch launch(op, a);
  Tensor out = empty_like_strided(a);
  launch(launcher, {dtype_of(a), relu, a.numel(), a.data_ptr(), b.data_ptr(), out.data_ptr()});
  return out;
}

Tensor add_act(const Tensor& x, const Tensor& residual, const std::string& act) {
  check_pair("add_act", {"x", x}, {"residual", residual});
  return run("add_act", launch_add_act, x, residual, act);
}

Tensor add_act_backward(const Tensor& grad_y, const Tensor& y, const std::string& act) {
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
