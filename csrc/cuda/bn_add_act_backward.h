// bn_add_act_backward: dz = grad_y [+ grad_y2] where the mask lets it pass is grad_residual; the gradients of x, weight and
// bias for dz.
#pragma once

#include "cuda/bn_act_backward.h"

namespace fastres::cuda {

using BnAddActBackwardParams = BnActBackwardParams;

cudaError_t launch_bn_add_act_backward(const BnAddActBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
