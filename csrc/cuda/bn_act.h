// bn_act: y = act((x - mean) / sqrt(var + eps) * weight + bias), statistics given.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/bn_args.h"

namespace fastres::cuda {

struct BnActParams {
  BnGeometry geometry;
  DType dtype;
  bool relu;
  float eps;
  const void* x;
  const void* residual;  // bn_add_act
  void* y;
  ChannelVector weight, bias, mean, var;
  uint8_t* mask = nullptr;  // bn_add_act, bn_add_bn_act: of the ReLU in training, see relu_mask.h
};

cudaError_t launch_bn_act(const BnActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
