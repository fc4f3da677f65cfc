// Formula: dz = grad_y [+ grad_y2] where the mask lets it pass, else 0; the gradients of both norms for dz, as
// bn_act_backward from dz.
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: reduction three reads, then three reads and two writes, and twice the mask; with grad_y2 the reduction
// reads four and writes dz, where grad_residual will be, and the mask is read once.
// Accumulate type: float, double between threads and blocks; dz is exact without grad_y2, grad_x and grad_residual are
// rounded once.
// Invariants: fixed order whatever the device; no division by a weight, which may be 0.
#include "cuda/bn_add_bn_act.h"
#include "cuda/device/bn_backward.cuh"

namespace fastres::cuda {

constexpr int kSlots = kUnroll / 2;  // up to four operands, and tables of two norms

// The operands of one thread, and dz from them.
template <typename Traits>
struct Operands {
  using scalar_t = typename Traits::scalar_t;
  const scalar_t *grad_y, *x, *residual;
  const uint8_t* mask;
  bool relu;
  typename Traits::Vector grad_y_in[kSlots], x_in[kSlots], residual_in[kSlots];
  unsigned mask_in[kSlots];

  __device__ explicit Operands(const BnAddBnActBackwardParams& p)
      : grad_y(static_cast<const scalar_t*>(p.bn.grad_y)), x(static_cast<const scalar_t*>(p.bn.x)),
        residual(static_cast<const scalar_t*>(p.residual.x)), mask(p.bn.mask), relu(p.bn.relu) {}

  __device__ void fetch(int slot, int64_t offset) {
    grad_y_in[slot] = load<Traits::kVec>(grad_y + offset);
    x_in[slot] = load<Traits::kVec>(x + offset);
    residual_in[slot] = load<Traits::kVec>(residual + offset);
    mask_in[slot] = load_mask(mask, offset, relu);
  }

  __device__ float grad(int slot, int j) const { return to_float(grad_y_in[slot].v[j]); }
  __device__ float masked(int slot, int j, float grad) const { return mask_in[slot] >> j & 1 ? grad : 0.0f; }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2)
    bn_add_bn_act_backward_reduce_kernel(const __grid_constant__ BnAddBnActBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* grad_y2 = static_cast<const scalar_t*>(p.bn.grad_y2);
  auto* dz_out = static_cast<scalar_t*>(p.residual.grad_x);
  const bool two = grad_y2 != nullptr;
  let_the_next_kernel_start();
  const Tile tile(p.bn.geometry, false);
  const Walk<Traits> walk(p.bn.geometry, tile);
  Operands<Traits> in(p);
  prefetch_first(walk, in.grad_y, in.x, in.residual);
  float affine[2 * kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) {
    fill_affine(p.bn, c, entry);
    fill_affine(p.residual, c, entry + kAffineRows);
  });

  GradientSums<Traits::kVec> sums{}, residual_sums{};
  typename Traits::Vector grad_y2_in[kSlots];
  for_each_vector<kSlots>(
      walk,
      [&](int slot, int64_t offset) {
        in.fetch(slot, offset);
        if (two) grad_y2_in[slot] = load<Traits::kVec>(grad_y2 + offset);
      },
      [&](int slot, int64_t offset) {
        float dzs[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          const float grad = two ? in.grad(slot, j) + to_float(grad_y2_in[slot].v[j]) : in.grad(slot, j);
          const float dz = dzs[j] = in.masked(slot, j, grad);
          const float x_centred = to_float(in.x_in[slot].v[j]) - affine[kMean][lane];
          const float residual_centred = to_float(in.residual_in[slot].v[j]) - affine[kAffineRows + kMean][lane];
          sums.dz[j] += dz;
          sums.dzx[j] = fmaf(dz, x_centred, sums.dzx[j]);
          residual_sums.dzx[j] = fmaf(dz, residual_centred, residual_sums.dzx[j]);
        }
        if (two) store(dz_out + offset, dzs);
      });
#pragma unroll
  for (int j = 0; j < Traits::kVec; ++j) residual_sums.dz[j] = sums.dz[j];
  write_partial<Traits>(p.bn, tile, sums);
  write_partial<Traits>(p.residual, tile, residual_sums);
}

// Rows of the table of one norm; the residual's follow.
enum GradientRow { kGradMean, kGradScale, kMeanDz, kSlope, kGradientRows };

__device__ __forceinline__ void fill_gradient(const BnActBackwardParams& p, int64_t channel, float* entry) {
  const float invstd = inverse_std(channel_value(p.var, channel, 1.0f), p.eps);
  entry[kGradMean] = channel_value(p.mean, channel, 0.0f);
  entry[kGradScale] = channel_value(p.weight, channel, 1.0f) * invstd;
  entry[kMeanDz] = p.correction[channel];
  entry[kSlope] = p.correction[p.geometry.channels + channel];
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads)
    bn_add_bn_act_backward_input_kernel(const __grid_constant__ BnAddBnActBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  auto* grad_x = static_cast<scalar_t*>(p.bn.grad_x);
  auto* grad_residual = static_cast<scalar_t*>(p.residual.grad_x);
  const Tile tile(p.bn.geometry, true);
  const Walk<Traits> walk(p.bn.geometry, tile);
  Operands<Traits> in(p);
  prefetch_first(walk, in.grad_y, in.x, in.residual);
  wait_for_the_kernel_before();
  float table[2 * kGradientRows][Traits::kLanes];
  load_table(tile, table, Traits{}, [&](int64_t c, float* entry) {
    fill_gradient(p.bn, c, entry);
    fill_gradient(p.residual, c, entry + kGradientRows);
  });

  for_each_vector<kSlots>(
      walk, [&](int slot, int64_t offset) { in.fetch(slot, offset); },
      [&](int slot, int64_t offset) {
        float dx[Traits::kVec], dr[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          const float dz = in.masked(slot, j, in.grad(slot, j));
          const auto gradient = [&](float value, int row) {
            return normalise_grad(dz, value, table[row + kGradMean][lane], table[row + kGradScale][lane],
                                  table[row + kMeanDz][lane], table[row + kSlope][lane]);
          };
          dx[j] = gradient(to_float(in.x_in[slot].v[j]), 0);
          dr[j] = gradient(to_float(in.residual_in[slot].v[j]), kGradientRows);
        }
        store(grad_x + offset, dx);
        store(grad_residual + offset, dr);
      });
}

cudaError_t launch_bn_add_bn_act_backward(const BnAddBnActBackwardParams& params, cudaStream_t stream) {
  const BnGeometry& g = params.bn.geometry;
  cudaError_t status = with_bn_traits(params.bn.dtype, g, [&](auto traits) {
    return launch_bn(bn_add_bn_act_backward_reduce_kernel<decltype(traits)>, g, params, stream);
  });
  if (status == cudaSuccess) status = launch_bn_backward_merge(params.bn, stream);
  if (status == cudaSuccess) status = launch_bn_backward_merge(params.residual, stream);
  if (status != cudaSuccess) return status;
  BnAddBnActBackwardParams input = params;
  input.bn.geometry = finer(g);
  if (params.bn.grad_y2 != nullptr) {  // dz was left there, masked
    input.bn.grad_y = params.residual.grad_x;
    input.bn.relu = false;
  }
  return with_bn_traits(params.bn.dtype, g, [&](auto traits) {
    return launch_bn_behind(bn_add_bn_act_backward_input_kernel<decltype(traits)>, input.bn.geometry, input, stream);
  });
}

}  // namespace fastres::cuda
