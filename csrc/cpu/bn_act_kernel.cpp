// Formula: y = act((x - mean) * scale + bias), scale = weight / sqrt(var + eps), and its gradients (see bn_kernel.h).
// Layout: rows of bn_args.h, walked in memory order; a thread owns rows, or chunks of rows whose sums are merged in order.
// Bytes per element: statistics one read; forward one read, one write; backward two passes of two reads, one write.
// Accumulate type: float (double for float64) per element, double for sums; one rounding, to the output type.
// Invariants: sums do not depend on the number of threads; the mask of backward is that of forward, bit for bit.
#include "cpu/bn_kernel.h"

namespace fastres::cpu::FASTRES_LEVEL {

void bn_statistics(const BnArgs& shared, int64_t begin, int64_t end) {
  with_layout(shared, [&](BnArgs args, auto type, auto last) {
    using scalar_t = decltype(type);
    using acc_t = acc_of<scalar_t>;
    constexpr int64_t L = kLanes<acc_t>;
    const auto* x = static_cast<const scalar_t*>(args.x);
    const auto* shift = static_cast<const acc_t*>(args.shift);
    reduce_chunks<last.value, 4, acc_t>(args, begin, end, [&](int64_t entry) {
      return [&, shift = channel_value<acc_t, L, last.value>(shift, entry)](int64_t offset, auto lanes) {
        const auto d = read<acc_t, L>(x + offset, lanes) - shift;
        return Pair<Vec<acc_t, L>>{d, d * d};
      };
    });
  });
}

// Channels last: the columns c, c + channels, ... of every chunk; contiguous: kSumLanes neighbours of every slice.
void bn_merge(const BnArgs& args, int64_t begin, int64_t end) {
  const int64_t parts = args.channels_last ? args.chunks : args.slices;
  const int64_t channel_stride = args.channels_last ? 1 : kSumLanes;
  const int64_t copy_stride = args.channels_last ? args.channels : 1;
  const int64_t copies = args.width / args.channels;
  for (int64_t half = 0; half < 2; ++half) {
    double* sums = args.sums + half * args.channels;
    for (int64_t c = begin; c < end; ++c) sums[c] = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const double* partial = args.partial + (part * 2 + half) * args.width;
      for (int64_t copy = 0; copy < copies; ++copy)
        for (int64_t c = begin; c < end; ++c) sums[c] += partial[c * channel_stride + copy * copy_stride];
    }
  }
}

void bn_act_forward(const BnArgs& args, int64_t begin, int64_t end) { forward<false>(args, begin, end); }
void bn_act_sums(const BnArgs& args, int64_t begin, int64_t end) { sums<false, false>(args, begin, end); }
void bn_act_gradient(const BnArgs& args, int64_t begin, int64_t end) { gradient(args, begin, end); }

}  // namespace fastres::cpu::FASTRES_LEVEL
