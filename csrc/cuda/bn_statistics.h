// bn_statistics: mean and biased variance of each channel of x over the batch, for the training forms of the batch-norm ops.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/bn_args.h"

namespace fastres::cuda {

struct BnStatisticsParams {
  BnGeometry geometry;
  DType dtype;
  const void* x;
  float* partial;  // workspace of geometry.partials() floats
  float* mean;
  float* var;
};

cudaError_t launch_bn_statistics(const BnStatisticsParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
