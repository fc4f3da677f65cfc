// Convolutions with folded weights by Hopper's widest products: y = act(conv(x, weight) + bias [+ residual]).
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/images.h"

namespace fastres::cuda {

struct ConvWideParams {
  DType dtype;  // float16 or bfloat16
  bool relu;
  Images x;  // NHWC; channels, here and of the output, are multiples of 8: pixels are aligned to 16 bytes
  Window window;
  int channels_out;
  const void* x_data;
  const void* weight;  // [channels_out, kernel h, kernel w, channels]
  const float* bias;
  const void* residual;  // or null
  void* y;
};

cudaError_t launch_sm90_conv_wide(const ConvWideParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
