// bn_add_act: y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), statistics given.
#pragma once

#include "cuda/bn_act.h"

namespace fastres::cuda {

using BnAddActParams = BnActParams;

cudaError_t launch_bn_add_act(const BnAddActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
