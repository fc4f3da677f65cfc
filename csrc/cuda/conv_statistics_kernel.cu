// Formula: mean = sum(y) / n, var = sum((y - mean)^2) / n of each channel, from the statistics of parts of y, none of which need
// have values.
// Layout: a block owns 8 channels; its threads are (x: channels, y: parts).
// Bytes: 8 a part and channel.
// Accumulate type: double.
// Invariants: fixed order; a constant channel has var == 0 exactly; var is not negative.
#include "cuda/conv_statistics.h"
#include "cuda/device/bn_merge.cuh"

namespace fastres::cuda {

__global__ void __launch_bounds__(kMergeThreads)
    conv_statistics_merge_kernel(const __grid_constant__ ConvStatisticsParams p) {
  BnGeometry g{};
  g.channels = p.conv.channels_out;
  g.splits = p.parts;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x;
  const auto own = merge_partials<MomentSums<1>>(g, channel, [&](int64_t part) {
    const float* moments = p.moments + part * 2 * g.channels + channel;
    return Moments<1>{p.counts[part], {moments[0]}, {moments[g.channels]}}.sums();
  });
  if (threadIdx.y > 0 || channel >= g.channels) return;
  p.mean[channel] = static_cast<float>(own.mean(0));
  p.var[channel] = static_cast<float>(gpu_relu(own.m2(0) / own.count));
}

cudaError_t launch_conv_statistics_merge(const ConvStatisticsParams& params, cudaStream_t stream) {
  BnGeometry g{};
  g.channels = params.conv.channels_out;
  return launch_merge(conv_statistics_merge_kernel, g, params, stream);
}

}  // namespace fastres::cuda
