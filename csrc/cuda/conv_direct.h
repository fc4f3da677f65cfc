// Convolutions of stride 1 that keep the size of the images, weights folded: y = act(conv(x, weight) + bias [+ residual]).
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/images.h"

namespace fastres::cuda {

struct ConvDirectParams {
  DType dtype;  // float16 or bfloat16
  bool relu;
  Images x;  // NHWC; channels, here and of the output, are multiples of 8: pixels are aligned to 16 bytes
  Window window;  // stride 1, output of x's size
  int channels_out;
  const void* x_data;
  const void* weight;  // [channels_out, kernel h, kernel w, channels]
  const float* bias;
  const void* residual;  // or null
  void* y;
};

constexpr int kLeastDirectTaps = 5;  // of a window

// Whether what lies under a window, from row to row, is short enough for shared memory.
bool sm90_conv_direct_fits(const Images& x, const Window& window);
cudaError_t launch_sm90_conv_direct(const ConvDirectParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
