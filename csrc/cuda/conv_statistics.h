// conv_statistics: y = conv(x, weight), and mean and biased variance of each channel of y over the batch.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/conv_bn_act.h"

namespace fastres::cuda {

struct ConvStatisticsParams {
  ConvActParams conv;
  int64_t parts;   // in which y is divided
  float* moments;  // workspace of [parts, 2, channels_out]: of a part's values mean and sum of squared deviations from it
  float* counts;   // workspace of [parts]: how many values a channel they are
  float* mean;
  float* var;
};

// Merges the parts.
cudaError_t launch_conv_statistics_merge(const ConvStatisticsParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
