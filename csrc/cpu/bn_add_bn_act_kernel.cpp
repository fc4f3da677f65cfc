// Formula: y = act((x - mean) * scale + bias + (r - mean_r) * scale_r + bias_r), scale = weight / sqrt(var + eps).
// Layout: rows of bn_args.h, walked in memory order; a thread owns rows.
// Bytes per element: two reads, one write.
// Accumulate type: float (double for float64); one rounding, to the output type.
// Invariants: the normalised residual is never written; its rows are those of x.
#include "cpu/bn_add_bn_act.h"

#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

void bn_add_bn_act_forward(const BnAddBnActArgs& both, int64_t begin, int64_t end) {
  with_traits(both.bn, [&](BnArgs args, auto type, auto last, auto is_relu) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    constexpr bool kLast = last.value;
    const BnArgs other = both.residual;
    auto* y = static_cast<scalar_t*>(args.out);
    for_each_row<kLast, L>(args, begin, end, y, [&](int64_t offset, int64_t entry, auto lanes) {
      const auto normalised = [&](const BnArgs& from) {
        return normalise(load<acc_t, L>(static_cast<const scalar_t*>(from.x) + offset, lanes),
                         channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(from.mean), entry),
                         channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(from.scale), entry),
                         channel_value<acc_t, L, kLast>(static_cast<const acc_t*>(from.bias), entry));
      };
      const auto z = normalised(args) + normalised(other);
      store<L>(y + offset, is_relu.value ? relu(z) : z, lanes);
    });
  });
}

}  // namespace fastres::cpu::FASTRES_LEVEL
