// Formula: y = act((x - mean) * scale + bias + (r - mean_r) * scale_r + bias_r), scale = weight / sqrt(var + eps).
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the positions (bn_args.h).
// Bytes per element: two reads, one write, in training an eighth of a byte of mask more.
// Accumulate type: float; one rounding, to the output type, none before the addition.
// Invariants: every element is written once, the normalised residual never; walks backwards, for L2 after bn_statistics.
#include "cuda/bn_add_bn_act.h"
#include "cuda/device/batch_norm.cuh"

namespace fastres::cuda {

template <typename Traits, bool kMask>
__global__ void __launch_bounds__(kThreads) bn_add_bn_act_kernel(const __grid_constant__ BnAddBnActParams p) {
  using scalar_t = typename Traits::scalar_t;
  constexpr int kSlots = sizeof(typename Traits::Vector) > 16 ? kUnroll / 4 : kUnroll;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* residual = static_cast<const scalar_t*>(p.residual.x);
  auto* y = static_cast<scalar_t*>(p.bn.y);

  const Tile tile(p.bn.geometry, true);
  const Walk<Traits> walk(p.bn.geometry, tile);
  prefetch_first(walk, x, residual);
  wait_for_the_kernel_before();
  float affine[2 * kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) {
    fill_affine(p.bn, c, entry);
    fill_affine(p.residual, c, entry + kAffineRows);
  });

  typename Traits::Vector x_in[kSlots], residual_in[kSlots];
  for_each_vector<kSlots>(
      walk,
      [&](int slot, int64_t offset) {
        x_in[slot] = load<Traits::kVec>(x + offset);
        residual_in[slot] = load<Traits::kVec>(residual + offset);
      },
      [&](int slot, int64_t offset) {
        float out[Traits::kVec];
#pragma unroll
        for (int j = 0; j < Traits::kVec; ++j) {
          const int lane = Traits::lane(j);
          const auto normalised = [&](float value, int row) {
            return normalise(value, affine[row + kMean][lane], affine[row + kScale][lane], affine[row + kBias][lane]);
          };
          const float z = normalised(to_float(x_in[slot].v[j]), 0) + normalised(to_float(residual_in[slot].v[j]), kAffineRows);
          out[j] = p.bn.relu ? gpu_relu(z) : z;
        }
        store(y + offset, out);
        if constexpr (kMask) store_mask<scalar_t>(p.bn.mask, offset, out);
      });
}

cudaError_t launch_bn_add_bn_act(const BnAddBnActParams& whole, cudaStream_t stream) {
  BnAddBnActParams params = whole;
  params.bn.geometry = finer(whole.bn.geometry);
  return with_mask_beside(params.bn, stream, [&](auto traits, auto mask) {
    return launch_bn_behind(bn_add_bn_act_kernel<decltype(traits), mask.value>, params.bn.geometry, params, stream);
  });
}

}  // namespace fastres::cuda
