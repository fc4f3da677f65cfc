// Formula: dz = grad_y where act passes it; grad_bias = sum(dz), grad_weight = sum(dz * xhat); grad_x = see normalise_grad.
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: reduction two reads (and, in evaluation, the one write of grad_x), grad_x two reads, one write.
// Accumulate type: float in a thread, double between threads and blocks; grad_x is rounded once.
// Invariants: the mask is that of bn_act, bit for bit; no division by weight, which may be 0; fixed order on any device.
#include "cuda/bn_act_backward.h"
#include "cuda/device/bn_backward.cuh"
#include "cuda/device/bn_merge.cuh"

namespace fastres::cuda {

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2) bn_act_backward_reduce_kernel(const __grid_constant__ BnActBackwardParams p) {
  bn_backward_reduce<Traits, false, false>(p);
}

__global__ void __launch_bounds__(kMergeThreads) bn_backward_merge_kernel(const __grid_constant__ BnActBackwardParams p) {
  const BnGeometry& g = p.geometry;
  const int64_t channel = int64_t{blockIdx.x} * kMergeChannels + threadIdx.x;
  const auto own = merge_partials<GradientSums<1, double>>(g, channel, [&](int64_t split) {
    const float* partial = p.partial + split * 2 * g.channels + channel;
    return GradientSums<1, double>{{partial[0]}, {partial[g.channels]}};
  });
  if (threadIdx.y > 0 || channel >= g.channels) return;
  const double invstd = 1.0 / sqrt(double{channel_value(p.var, channel, 1.0f)} + p.eps);
  const double grad_weight = own.dzx[0] * invstd;
  set_channel_value(p.grad_weight, p.grad_weight_dtype, channel, static_cast<float>(grad_weight));
  set_channel_value(p.grad_bias, p.grad_bias_dtype, channel, static_cast<float>(own.dz[0]));
  if (!p.training) return;
  const double elements = static_cast<double>(g.elements);
  p.correction[channel] = static_cast<float>(own.dz[0] / elements);
  p.correction[g.channels + channel] = static_cast<float>(grad_weight * invstd / elements);
}

// Rows of the table beyond those of the affine part.
enum GradientRow { kMeanDz = kAffineRows, kSlope, kGradientRows };

template <typename Traits>
__global__ void __launch_bounds__(kThreads) bn_backward_input_kernel(const __grid_constant__ BnActBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* grad_y = static_cast<const scalar_t*>(p.grad_y);
  const auto* x = static_cast<const scalar_t*>(p.x);
  auto* grad_x = static_cast<scalar_t*>(p.grad_x);

  const Tile tile(p.geometry, true);
  const Walk<Traits> walk(p.geometry, tile);
  prefetch_first(walk, grad_y, x);
  wait_for_the_kernel_before();
  float table[kGradientRows][Traits::kLanes];
  load_table(tile, table, Traits{}, [&](int64_t c, float* entry) {
    fill_affine(p, c, entry);
    entry[kMeanDz] = p.correction[c];
    entry[kSlope] = p.correction[p.geometry.channels + c];
  });

  typename Traits::Vector grad_y_in[kUnroll], x_in[kUnroll];
  for_each_vector<kUnroll>(
      walk,
      [&](int slot, int64_t offset) {
        grad_y_in[slot] = load<Traits::kVec>(grad_y + offset);
        x_in[slot] = load<Traits::kVec>(x + offset);
      },
      [&](int slot, int64_t offset) {
        float dx[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          const float mean = table[kMean][lane], scale = table[kScale][lane];
          const float x_j = to_float(x_in[slot].v[j]);
          const float z = normalise(x_j, mean, scale, table[kBias][lane]);
          const float dz = masked<scalar_t>(to_float(grad_y_in[slot].v[j]), z, p.relu);
          dx[j] = normalise_grad(dz, x_j, mean, scale, table[kMeanDz][lane], table[kSlope][lane]);
        }
        store(grad_x + offset, dx);
      });
}

cudaError_t launch_bn_backward_merge(const BnActBackwardParams& params, cudaStream_t stream) {
  return launch_merge(bn_backward_merge_kernel, params.geometry, params, stream);
}

cudaError_t launch_bn_backward_input(const BnActBackwardParams& params, cudaStream_t stream) {
  BnActBackwardParams input = params;
  input.geometry = finer(params.geometry);
  return with_bn_traits(params.dtype, params.geometry, [&](auto traits) {
    return launch_bn_behind(bn_backward_input_kernel<decltype(traits)>, input.geometry, input, stream);
  });
}

cudaError_t launch_bn_act_backward(const BnActBackwardParams& params, cudaStream_t stream) {
  cudaError_t status = with_bn_traits(params.dtype, params.geometry, [&](auto traits) {
    return launch_bn(bn_act_backward_reduce_kernel<decltype(traits)>, params.geometry, params, stream);
  });
  if (status == cudaSuccess) status = launch_bn_backward_merge(params, stream);
  return status == cudaSuccess && params.training ? launch_bn_backward_input(params, stream) : status;
}

}  // namespace fastres::cuda
