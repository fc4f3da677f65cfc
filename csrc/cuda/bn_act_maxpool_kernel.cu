// Formula: y = max over the window of act((x - mean) * scale + bias), as torch.max_pool2d: first maximum, last NaN, no padding.
// Layout: channels_last or contiguous; a block owns a tile of channels and a share of the pixels of y.
// Bytes per element of x: one read (what windows share is in the caches), 1 / stride^2 writes; nothing normalised is written.
// Accumulate type: float; the activation is rounded to the output type before it is compared.
// Invariants: the expression is that of the backward, bit for bit; walks backwards, for L2 after bn_statistics.
#include "cuda/device/pool_strip.cuh"

namespace fastres::cuda {

template <typename Traits>
__global__ void __launch_bounds__(kThreads) bn_act_maxpool_kernel(const __grid_constant__ BnActMaxpoolParams p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  auto* y = static_cast<scalar_t*>(p.bn.y);
  const BnGeometry& g = p.bn.geometry;
  const Tile tile(g, true);
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p.bn, c, entry); });

  const Pixels<Traits> in(g, tile, p.pool.in), out(g, tile, p.pool.out);
  for (PixelWalk<Traits> at(g, tile, p.pool.out); at; at.next()) {
    Maxima<Traits::kVec> best;
    for_each_tap(p.pool, in, x + in.image(at.image), at.row, at.column, [&](const auto& x_in, int tap) {
#pragma unroll
      for (int j = 0; j < Traits::kVec; ++j) {
        const float x_j = to_float(x_in.v[j]);
        best.replace(j, activated<scalar_t>(x_j, affine[kMean][j], affine[kScale][j], affine[kBias][j], p.bn.relu), tap);
      }
    });
    store(y + out.image(at.image) + out.pixel(at.row, at.column), best.value);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 3)
    bn_act_maxpool_strip_kernel(const __grid_constant__ BnActMaxpoolParams p) {
  using scalar_t = typename Traits::scalar_t;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  auto* y = static_cast<scalar_t*>(p.bn.y);
  const BnGeometry& g = p.bn.geometry;
  wait_for_the_kernel_before();
  const Tile tile(g, true);
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p.bn, c, entry); });

  const Pixels<Traits> in(g, tile, p.pool.in), out(g, tile, p.pool.out);
  for_each_strip<Traits>(g, tile, p.pool, [&](int64_t n, int strip, int column) {
    auto* image = y + out.image(n);
    Strip<Traits>(p.pool, in, x + in.image(n), strip, column)
        .template walk<PlainMaxima<Traits>>(affine, [](int) {}, [&](int row, const PlainMaxima<Traits>& best) {
          store(image + out.near(row, column), maximum(best.value, typename Traits::Vector{}));
        });
  });
}

cudaError_t launch_bn_act_maxpool(const BnActMaxpoolParams& params, cudaStream_t stream) {
  if (params.pool.strips > 0)
    return with_strip_traits(params.bn.dtype, [&](auto traits) {
      return launch_bn_behind(bn_act_maxpool_strip_kernel<decltype(traits)>, params.bn.geometry, params, stream);
    });
  return with_pool_traits(params.bn.dtype, params.bn.geometry, [&](auto traits) {
    return launch_bn(bn_act_maxpool_kernel<decltype(traits)>, params.bn.geometry, params, stream);
  });
}

}  // namespace fastres::cuda
