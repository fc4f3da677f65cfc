// Formula: y = act((x - mean) * scale + bias + (r - mean_r) * scale_r + bias_r), scale = weight / sqrt(var + eps).
// Layout: rows of bn_args.h, walked in memory order; a thread owns rows.
// Bytes per element: two reads, one write, in training a bit more.
// Accumulate type: float (double for float64); one rounding, to the output type.
// Invariants: the normalised residual is never written; its rows are those of x.
#include "cpu/bn_add_bn_act.h"

#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

void bn_add_bn_act_forward(const BnAddBnActArgs& both, int64_t begin, int64_t end) {
  with_traits(both.bn, [&](BnArgs args, auto type, auto last, auto is_relu) {
    with_mask<is_relu.value>(args, [&](auto has_mask) {
      using scalar_t = decltype(type);
      using acc_t = acc_of<scalar_t>;
      constexpr int64_t L = kLanes<acc_t>;
      constexpr bool kLast = last.value, kRelu = is_relu.value, kMask = has_mask.value;
      const BnArgs other = both.residual;
      auto* y = static_cast<scalar_t*>(args.out);
      const auto *x = static_cast<const scalar_t*>(args.x), *residual = static_cast<const scalar_t*>(other.x);
      for_each_row<kLast, L>(args, begin, end, y, [&](int64_t entry) {
        return [&, own = load_affine<acc_t, L, kLast>(args, entry), shortcut = load_affine<acc_t, L, kLast>(other, entry)](
                   int64_t offset, auto lanes) {
          const auto z = own(read<acc_t, L>(x + offset, lanes)) + shortcut(read<acc_t, L>(residual + offset, lanes));
          store_activated<L, kLast, kRelu, kMask>(args, y, offset, z, lanes);
        };
      });
    });
  });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
