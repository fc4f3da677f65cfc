// bn_add_bn_act: y = act(bn(x) + bn(residual)), each with its own parameters and statistics; and its gradients.
#pragma once

#include "cuda/bn_act.h"
#include "cuda/bn_act_backward.h"

namespace fastres::cuda {

// Both divide the tensors alike; what the residual's do not say (y, grad_y, relu) the first ones do.
struct BnAddBnActParams {
  BnActParams bn;
  BnActParams residual;  // the residual is its x
};

struct BnAddBnActBackwardParams {
  BnActBackwardParams bn;
  BnActBackwardParams residual;  // the residual is its x, grad_residual its grad_x
};

cudaError_t launch_bn_add_bn_act(const BnAddBnActParams& params, cudaStream_t stream);
cudaError_t launch_bn_add_bn_act_backward(const BnAddBnActBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
