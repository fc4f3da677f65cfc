// Formula: y = act(x [+ residual]), also in place; backward: grad = grad_y where y > 0 or y is NaN, else 0.
// Layout: any dense storage order, the same for all operands; a range of elements belongs to one thread.
// Bytes per element: two reads and one write, the write past the caches for outputs that would not stay in them.
// Accumulate type: float (double for float64); one rounding, to the output type.
// Invariants: every element is written once; pointers may be aligned to their element only.
#include "cpu/add_act.h"

#include "common/epilogue.h"
#include "cpu/loops.h"

namespace fastres::cpu::FASTRES_LEVEL {

void add_act_forward(const AddActArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) {
    with_bool(args.act == Act::kRelu, [&](auto is_relu) { with_bool(args.b != nullptr, [&](auto has_residual) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      const auto* x = static_cast<const scalar_t*>(args.a) + begin;
      const auto* residual = has_residual.value ? static_cast<const scalar_t*>(args.b) + begin : nullptr;
      auto* y = static_cast<scalar_t*>(args.out) + begin;
      for_each<L>(end - begin, y, args.stream, [&](int64_t i, auto lanes) {
        auto v = load<acc_t, L>(x + i, lanes);
        if constexpr (has_residual.value) v += load<acc_t, L>(residual + i, lanes);
        store<L>(y + i, is_relu.value ? relu(v) : v, lanes);
      });
    }); });
  });
  if (args.stream) stream_fence();
}

void add_act_gradient(const AddActArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto type) {
    with_bool(args.act == Act::kRelu, [&](auto is_relu) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      const auto* grad_y = static_cast<const scalar_t*>(args.a) + begin;
      const auto* y = static_cast<const scalar_t*>(args.b) + begin;
      auto* grad = static_cast<scalar_t*>(args.out) + begin;
      for_each<L>(end - begin, grad, args.stream, [&](int64_t i, auto lanes) {
        const auto g = load<acc_t, L>(grad_y + i, lanes);
        if constexpr (is_relu.value) store<L>(grad + i, relu_gradient(g, load<acc_t, L>(y + i, lanes), acc_t{}), lanes);
        else store<L>(grad + i, g, lanes);
      });
    });
  });
  if (args.stream) stream_fence();
}

}  // namespace fastres::cpu::FASTRES_LEVEL
