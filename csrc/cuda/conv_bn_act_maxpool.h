// conv_bn_act_maxpool: y = max_pool(relu(conv(x, weight) + bias)) for few input channels, windows of 3x3 with stride 2 and
// padding 1: the stem of a network in one pass.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/conv.h"

namespace fastres::cuda {

// Of a side that the pool reads.
inline int pooled(int size) { return (size + 1) / 2; }

// Of the params y is what the pool gives, and there is a ReLU.
cudaError_t launch_conv_rows_maxpool(const ConvRowsParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
