// Convolutions by Hopper's widest products: y = act(conv(x, weight) + bias [+ residual]) with folded weights;
// y = conv(x, weight) with the statistics of its channels; and the gradients of a batch norm, from that of a convolution behind it.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/bn_act_backward.h"
#include "cuda/conv_bn_act.h"
#include "cuda/conv_statistics.h"

namespace fastres::cuda {

// Of the params it takes no shortcut and no splits.
cudaError_t launch_sm90_conv_wide(const ConvActParams& params, cudaStream_t stream);

// In how many parts the places are whose statistics the convolution writes; 0 where it cannot run.
int64_t sm90_conv_wide_parts(const ConvActParams& params);
// Of the convolution's params it takes no bias, no residual and no ReLU either.
cudaError_t launch_sm90_conv_wide_statistics(const ConvStatisticsParams& params, cudaStream_t stream);

struct ConvGradientParams {
  ConvActParams conv;        // of grad_y, its weight to be turned; residual: the batch norm's input; y: norm.grad_y
  BnActBackwardParams norm;  // in training; geometry.splits: the parts; grad_x may lie where grad_y does
};
cudaError_t launch_sm90_conv_wide_gradient(const ConvGradientParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
