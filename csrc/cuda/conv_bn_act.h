// Convolutions with folded weights: y = act(conv(x, weight) + bias [+ residual] [+ conv1x1(shortcut, shortcut_weight)]).
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/images.h"

namespace fastres::cuda {

struct ConvActParams {
  DType dtype;  // float16 or bfloat16
  bool relu;
  Images x;  // NHWC; channels, here and of the output, are multiples of 8: pixels are aligned to 16 bytes
  Window window;
  int channels_out;
  const void* x_data;
  const void* weight;  // [channels_out, kernel h, kernel w, channels]
  const float* bias;
  const void* residual;  // or null
  Images shortcut;
  Window shortcut_window;  // of one pixel, without padding
  const void* shortcut_data;    // or null
  const void* shortcut_weight;  // [channels_out, channels]
  const float* shortcut_bias;   // added to bias
  int splits;
  float* partial;  // workspace of [splits, pixels, channels_out], null for one split
  void* y;
};

// Blocks that share the depth of each tile where there are few tiles; more than 1 want a workspace.
int sm90_conv_splits(const ConvActParams& params);
cudaError_t launch_sm90_conv_act(const ConvActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
