// Formula: y = act((x - mean) * scale + bias + residual), scale = weight / sqrt(var + eps), and its gradients.
// Layout: rows of bn_args.h, walked in memory order; a thread owns rows, or chunks of rows whose sums are merged in order.
// Bytes per element: forward two reads, one write; backward three reads, one write, then two reads, one write.
// Accumulate type: float (double for float64) per element, double for sums; one rounding, to the output type.
// Invariants: sums do not depend on the number of threads; backward takes its mask from the saved y.
#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

void bn_add_act_forward(const BnArgs& args, int64_t begin, int64_t end) { forward<true>(args, begin, end); }
void bn_add_act_sums(const BnArgs& args, int64_t begin, int64_t end) { sums<true>(args, begin, end); }
void bn_add_act_gradient(const BnArgs& args, int64_t begin, int64_t end) { gradient<true>(args, begin, end); }

}  // namespace fastres::cpu::FASTRES_LEVEL
