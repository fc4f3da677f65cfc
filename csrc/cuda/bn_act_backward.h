// bn_act_backward: dz = grad_y where the activation passes it; the gradients of x, weight and bias for dz.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/bn_args.h"

namespace fastres::cuda {

struct BnActBackwardParams {
  BnGeometry geometry;
  DType dtype;
  bool relu;
  bool training;  // mean and var are those of x; else constants
  float eps;
  const void* grad_y;
  const void* grad_y2;  // at the end of a block: null, or a second part of the gradient of y
  const uint8_t* mask;  // bn_add_act: of the ReLU, see relu_mask.h
  const void* x;
  void* grad_x;
  void* grad_residual;  // bn_add_act
  ChannelVector weight, bias, mean, var;
  void* grad_weight;
  void* grad_bias;
  DType grad_weight_dtype, grad_bias_dtype;
  float* partial;       // workspace of geometry.partials() floats
  float* correction;    // training: workspace of [2, channels], see normalise_grad
};

cudaError_t launch_bn_act_backward(const BnActBackwardParams& params, cudaStream_t stream);

// Its parts, which bn_add_act_backward shares: the gradients of weight and bias from the partial sums; grad_x in training.
cudaError_t launch_bn_backward_merge(const BnActBackwardParams& params, cudaStream_t stream);
cudaError_t launch_bn_backward_input(const BnActBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
