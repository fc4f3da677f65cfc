// The mask of a ReLU at the end of a block: bit i % 8 of byte i / 8 is element i of y in memory order, set where not (y <= 0).
// The kernels that write y write it too where a vector of kMaskVec elements is a byte; elsewhere it is made from y.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/launch.h"

namespace fastres::cuda {

struct ReluMaskParams {
  DType dtype;
  int64_t numel;
  const void* y;
  uint8_t* mask;
};

cudaError_t launch_relu_mask(const ReluMaskParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
