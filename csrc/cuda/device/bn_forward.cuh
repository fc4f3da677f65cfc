// The body of bn_act and bn_add_act.
#pragma once

#include "cuda/bn_act.h"
#include "cuda/device/batch_norm.cuh"

namespace fastres::cuda {

// kMask: writes the mask of the ReLU beside y.
template <typename Traits, bool kAdd, bool kMask = false>
__device__ __forceinline__ void bn_forward(const BnActParams& p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* x = static_cast<const scalar_t*>(p.x);
  const auto* residual = static_cast<const scalar_t*>(p.residual);
  auto* y = static_cast<scalar_t*>(p.y);

  const Tile tile(p.geometry, true);
  const Walk<Traits> walk(p.geometry, tile);
    if constexpr (kAdd) prefetch_first(walk, x, residual);
  else prefetch_first(walk, x);
  wait_for_the_kernel_before();
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p, c, entry); });

  constexpr int kSlots = sizeof(typename Traits::Vector) > 16 ? kUnroll / 2 : kUnroll;
  typename Traits::Vector x_in[kSlots], residual_in[kSlots];
  for_each_vector<kSlots>(
      walk,
      [&](int slot, int64_t offset) {
        x_in[slot] = load<Traits::kVec>(x + offset);
        if constexpr (kAdd) residual_in[slot] = load<Traits::kVec>(residual + offset);
      },
      [&](int slot, int64_t offset) {
        float out[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          float z = normalise(to_float(x_in[slot].v[j]), affine[kMean][lane], affine[kScale][lane], affine[kBias][lane]);
          if constexpr (kAdd) z += to_float(residual_in[slot].v[j]);
          out[j] = p.relu ? gpu_relu(z) : z;
        }
        store(y + offset, out);
        if constexpr (kMask) store_mask<scalar_t>(p.mask, offset, out);
      });
}

}  // namespace fastres::cuda
