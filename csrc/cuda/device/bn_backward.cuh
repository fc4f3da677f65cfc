// The reduction of bn_act_backward and bn_add_act_backward, and what bn_act_maxpool_backward shares of it.
#pragma once

#include "cuda/bn_act_backward.h"
#include "cuda/device/batch_norm.cuh"
#include "cuda/device/reduce.cuh"

namespace fastres::cuda {

// Leaves the sums of a block, of which each thread has its own, in the workspace.
template <typename Traits>
__device__ __forceinline__ void write_partial(const BnActBackwardParams& p, const Tile& tile,
                                              const GradientSums<Traits::kVec>& sums) {
  GradientSums<Traits::kLanes, double> own = [&] {
    if constexpr (Traits::kChannelsLast) return sums.wide();
    else return sums.folded();
  }();
  reduce_along_y<kThreads>(own);
  const int lane = threadIdx.x * Traits::kLanes;
  if (threadIdx.y > 0 || lane >= tile.channels) return;
  float* partial = p.partial + tile.split * 2 * p.geometry.channels + tile.channel + lane;
#pragma unroll
  for (int j = 0; j < Traits::kLanes; ++j) {
    partial[j] = static_cast<float>(own.dz[j]);
    partial[p.geometry.channels + j] = static_cast<float>(own.dzx[j]);
  }
}

// Partial sums of dz and dz * (x - mean). Writes what is final already: dz where it is an output, grad_x in evaluation.
// kTwo: the gradient of y comes in two parts.
template <typename Traits, bool kAdd, bool kTwo>
__device__ __forceinline__ void bn_backward_reduce(const BnActBackwardParams& p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* grad_y = static_cast<const scalar_t*>(p.grad_y);
  const auto* grad_y2 = static_cast<const scalar_t*>(p.grad_y2);
  const auto* x = static_cast<const scalar_t*>(p.x);
  auto* grad_x = static_cast<scalar_t*>(p.grad_x);
  auto* grad_residual = static_cast<scalar_t*>(p.grad_residual);

  let_the_next_kernel_start();
  const Tile tile(p.geometry, false);
  const Walk<Traits> walk(p.geometry, tile);
  prefetch_first(walk, grad_y, x);
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p, c, entry); });

  // A thread's own positions.
  GradientSums<Traits::kVec> sums{};
  typename Traits::Vector grad_y_in[kUnroll], grad_y2_in[kUnroll], x_in[kUnroll];
  unsigned mask_in[kUnroll];
  for_each_vector<kUnroll>(
      walk,
      [&](int slot, int64_t offset) {
        grad_y_in[slot] = load<Traits::kVec>(grad_y + offset);
        if constexpr (kTwo) grad_y2_in[slot] = load<Traits::kVec>(grad_y2 + offset);
        x_in[slot] = load<Traits::kVec>(x + offset);
        if constexpr (kAdd) mask_in[slot] = load_mask(p.mask, offset, p.relu);
      },
      [&](int slot, int64_t offset) {
        float dz[Traits::kVec], dx[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          const float x_j = to_float(x_in[slot].v[j]);
          float grad_y_j = to_float(grad_y_in[slot].v[j]);
          if constexpr (kTwo) grad_y_j += to_float(grad_y2_in[slot].v[j]);
          if constexpr (kAdd) {
            dz[j] = mask_in[slot] >> j & 1 ? grad_y_j : 0.0f;
          } else {
            const float z = normalise(x_j, affine[kMean][lane], affine[kScale][lane], affine[kBias][lane]);
            dz[j] = masked<scalar_t>(grad_y_j, z, p.relu);
          }
          dx[j] = dz[j] * affine[kScale][lane];
          sums.dz[j] += dz[j];
          sums.dzx[j] = fmaf(dz[j], x_j - affine[kMean][lane], sums.dzx[j]);
        }
        if constexpr (kAdd) store(grad_residual + offset, dz);
        else if (!p.training) store(grad_x + offset, dx);
      });

  write_partial<Traits>(p, tile, sums);
}

}  // namespace fastres::cuda
