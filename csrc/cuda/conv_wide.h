// Convolutions with folded weights by Hopper's widest products: y = act(conv(x, weight) + bias [+ residual]).
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/conv_bn_act.h"

namespace fastres::cuda {

// Of the params it takes no shortcut and no splits.
cudaError_t launch_sm90_conv_wide(const ConvActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
