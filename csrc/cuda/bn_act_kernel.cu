// Formula: y = act((x - mean) * scale + bias), scale = weight / sqrt(var + eps).
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: one read, one write.
// Accumulate type: float; one rounding, to the output type.
// Invariants: the expression is that of bn_act_backward, bit for bit; walks backwards, for L2 after bn_statistics.
#include "cuda/device/bn_forward.cuh"

namespace fastres::cuda {

template <typename Traits>
__global__ void __launch_bounds__(kThreads) bn_act_kernel(const __grid_constant__ BnActParams p) {
  bn_forward<Traits, false>(p);
}

cudaError_t launch_bn_act(const BnActParams& whole, cudaStream_t stream) {
  BnActParams params = whole;
  params.geometry = finer(whole.geometry);
  return with_bn_traits(params.dtype, params.geometry, [&](auto traits) {
    return launch_bn_behind(bn_act_kernel<decltype(traits)>, params.geometry, params, stream);
  });
}

}  // namespace fastres::cuda
