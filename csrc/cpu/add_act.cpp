// Binding of add_act: checks, output, parallel loop, registration.
#include "cpu/add_act.h"

#include "cpu/host.h"

namespace fastres::cpu {
namespace {

void check_pair(const char* op, Named first, Named second) {
  check_cpu(op, first.param, first.tensor);
  fastres::check_pair(op, first, second, true);
}

template <typename Kernel>
Tensor run(Kernel kernel, const Tensor& a, const Tensor& b, Act act) {
  Tensor out = empty_like_strided(a);
  const DType dtype = dtype_of(a);
  const int64_t numel = a.numel();
  const AddActArgs args{dtype, act, should_stream(numel, dtype), a.data_ptr(), b.data_ptr(), out.data_ptr()};
  parallel_for(0, numel, kGrain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return out;
}

Tensor add_act(const Tensor& x, const Tensor& residual, const Text& act) {
  check_pair("add_act", {"x", x}, {"residual", residual});
  return run(add_act_forward, x, residual, act_of("add_act", act));
}

Tensor add_act_backward(const Tensor& grad_y, const Tensor& y, const Text& act) {
  check_pair("add_act_backward", {"grad_y", grad_y}, {"y", y});
  return run(add_act_gradient, grad_y, y, act_of("add_act_backward", act));
}

// The epilogue of a convolution: x = act(x [+ residual]) in place.
void add_act_(const Tensor& x, const OptionalTensor& residual, const Text& act) {
  check_pair("add_act_", {"x", x}, {"residual", residual.value_or(x)});
  const void* b = residual ? residual->data_ptr() : nullptr;
  const AddActArgs args{dtype_of(x), act_of("add_act_", act), false, x.data_ptr(), b, x.data_ptr()};
  parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) { add_act_forward(args, begin, end); });
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_add_act(Tensor x, Tensor residual, str act) -> Tensor");
  m.def("cpu_add_act_(Tensor(a!) x, Tensor? residual, str act) -> ()");
  m.def("cpu_add_act_backward(Tensor grad_y, Tensor y, str act) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_add_act", TORCH_BOX(&fastres::cpu::add_act));
  m.impl("cpu_add_act_", TORCH_BOX(&fastres::cpu::add_act_));
  m.impl("cpu_add_act_backward", TORCH_BOX(&fastres::cpu::add_act_backward));
}
