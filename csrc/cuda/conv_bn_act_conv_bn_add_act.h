// Two convolutions in one launch, y = act(conv1x1(middle) + last_bias + residual) of middle = act(conv(x) + bias), or three,
// z = act(conv1x1(y) + next_bias).
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/images.h"

namespace fastres::cuda {

struct ConvActConvActParams {
  DType dtype;  // float16 or bfloat16
  bool relu, last_relu, next_relu;
  Images x;       // NHWC, of 64 or 128 channels, as many as between the two
  Window window;  // that keeps the image's size
  int channels_out;
  const void* x_data;
  const void* weight;  // [channels, kernel h, kernel w, channels]
  const float* bias;
  const void* last_weight;  // [channels_out, channels]
  const float* last_bias;
  const void* residual;
  const void* next_weight;  // or null; [channels, channels_out]
  const float* next_bias;
  void* y;
  void* z;  // or null; of x's size
};

cudaError_t launch_sm90_conv_act_conv_act(const ConvActConvActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
