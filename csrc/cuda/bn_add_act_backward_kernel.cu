// Formula: dz = grad_y [+ grad_y2] where the mask lets it pass, else 0; sums of dz and dz * (x - mean); then as
// bn_act_backward from dz.
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: reduction two reads (three with grad_y2), the mask and one write (grad_residual = dz), grad_x two reads,
// one write.
// Accumulate type: float, double between threads and blocks; dz is exact without grad_y2, grad_x is rounded once.
// Invariants: fixed order whatever the device.
#include "cuda/bn_add_act_backward.h"
#include "cuda/device/bn_backward.cuh"

namespace fastres::cuda {

template <typename Traits, bool kTwo>
__global__ void __launch_bounds__(kThreads, 2)
    bn_add_act_backward_reduce_kernel(const __grid_constant__ BnAddActBackwardParams p) {
  bn_backward_reduce<Traits, true, kTwo>(p);
}

cudaError_t launch_bn_add_act_backward(const BnAddActBackwardParams& params, cudaStream_t stream) {
  cudaError_t status = with_bn_traits(params.dtype, params.geometry, [&](auto traits) {
    using Traits = decltype(traits);
    const auto kernel = params.grad_y2 == nullptr ? bn_add_act_backward_reduce_kernel<Traits, false>
                                                  : bn_add_act_backward_reduce_kernel<Traits, true>;
    return launch_bn(kernel, params.geometry, params, stream);
  });
  if (status == cudaSuccess) status = launch_bn_backward_merge(params, stream);
  if (status != cudaSuccess) return status;
  BnActBackwardParams input = params;
  input.relu = false;  // dz is masked already
  input.grad_y = params.grad_residual;
  return launch_bn_backward_input(input, stream);
}

}  // namespace fastres::cuda
