// Formula: y = act((x - mean) * scale + bias + residual), scale = weight / sqrt(var + eps).
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: two reads, one write, in training an eighth of a byte of mask more.
// Accumulate type: float; one rounding, to the output type, none before the addition.
// Invariants: every element is written once; walks backwards, for L2 after bn_statistics.
#include "cuda/bn_add_act.h"
#include "cuda/device/bn_forward.cuh"

namespace fastres::cuda {

template <typename Traits, bool kMask>
__global__ void __launch_bounds__(kThreads) bn_add_act_kernel(const __grid_constant__ BnAddActParams p) {
  bn_forward<Traits, true, kMask>(p);
}

cudaError_t launch_bn_add_act(const BnAddActParams& whole, cudaStream_t stream) {
  BnAddActParams params = whole;
  const BnGeometry g = params.geometry = finer(whole.geometry);
  return with_mask_beside(params, stream, [&](auto traits, auto mask) {
    return launch_bn_behind(bn_add_act_kernel<decltype(traits), mask.value>, g, params, stream);
  });
}

}  // namespace fastres::cuda
