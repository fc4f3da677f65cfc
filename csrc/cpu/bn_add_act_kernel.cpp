// Formula: y = act((x - mean) * scale + bias + residual), scale = weight / sqrt(var + eps), its mask; sums for its gradients.
// Layout: rows of bn_args.h, walked in memory order; a thread owns rows, or chunks of rows whose sums are merged in order.
// Bytes per element: forward two reads, one write, in training a bit more; sums two reads (three where the gradient of y
// comes in two parts) and a bit, one write.
// Accumulate type: float (double for float64) per element, double for sums; one rounding, to the output type.
// Invariants: sums do not depend on the number of threads; a thread writes whole bytes of the mask.
#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

void bn_add_act_forward(const BnArgs& args, int64_t begin, int64_t end) { forward<true>(args, begin, end); }
void bn_add_act_sums(const BnArgs& args, int64_t begin, int64_t end) {
  with_bool(args.grad_y2 != nullptr, [&](auto two) { sums<true, two.value>(args, begin, end); });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
