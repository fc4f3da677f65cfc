// Formula: y = act((x - mean) * scale + bias + residual), scale = weight / sqrt(var + eps).
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: two reads, one write.
// Accumulate type: float; one rounding, to the output type, none before the addition.
// Invariants: every element is written once; walks backwards, for L2 after bn_statistics.
#include "cuda/bn_add_act.h"
#include "cuda/device/bn_forward.cuh"

namespace fastres::cuda {

template <typename Traits>
__global__ void __launch_bounds__(kThreads) bn_add_act_kernel(const __grid_constant__ BnAddActParams p) {
  bn_forward<Traits, true>(p);
}

cudaError_t launch_bn_add_act(const BnAddActParams& params, cudaStream_t stream) {
  return with_bn_traits(params.dtype, params.geometry, [&](auto traits) {
    return launch_bn(bn_add_act_kernel<decltype(traits)>, params.geometry, params, stream);
  });
}

}  // namespace fastres::cuda
