// Formula: a gradient goes to the maximum of its window where act passes it, dz is their sum; then as bn_act_backward from dz.
// Layout: channels_last or contiguous; a block owns channels and a share of the pixels, of grad_y (sums) or of x (grad_x).
// Bytes: sums read x and grad_y and write a byte per element of grad_y; grad_x reads x, grad_y and the bytes, and is written.
// Accumulate type: float, double between threads and blocks; the activation is rounded before it is compared, grad_x once.
// Invariants: each x gathers its gradients in a fixed order, without atomics; sums in a fixed order on any device.
#include "cuda/device/bn_backward.cuh"
#include "cuda/device/pool.cuh"

namespace fastres::cuda {

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_maxpool_backward_reduce_kernel(const __grid_constant__ BnActMaxpoolBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  constexpr int kVec = Traits::kVec;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* grad_y = static_cast<const scalar_t*>(p.bn.grad_y);
  const BnGeometry& g = p.bn.geometry;
  const Tile tile(g, false);
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p.bn, c, entry); });

  const Pixels<Traits> in(g, tile, p.pool.in), out(g, tile, p.pool.out);
  GradientSums<kVec> sums{};
  for (PixelWalk<Traits> at(g, tile, p.pool.out); at; at.next()) {
    const int64_t offset = out.image(at.image) + out.pixel(at.row, at.column);
    const auto grad_in = load<kVec>(grad_y + offset);
    Maxima<kVec> best;
    float best_x[kVec];
    for_each_tap(p.pool, in, x + in.image(at.image), at.row, at.column, [&](const auto& x_in, int tap) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float x_j = to_float(x_in.v[j]);
        const float z = activated<scalar_t>(x_j, affine[kMean][j], affine[kScale][j], affine[kBias][j], p.bn.relu);
        if (best.replace(j, z, tap)) best_x[j] = x_j;
      }
    });
    uint8_t taps[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float grad = to_float(grad_in.v[j]);
      const float dz = p.bn.relu ? relu_gradient(grad, best.value[j], 0.0f) : grad;
      taps[j] = static_cast<uint8_t>(p.bn.relu && best.value[j] <= 0.0f ? kNoTap : best.tap[j]);
      sums.dz[j] += dz;
      sums.dzx[j] = fmaf(dz, best_x[j] - affine[kMean][j], sums.dzx[j]);
    }
    store_bytes(p.taps + offset, taps);
  }
  write_partial<Traits>(p.bn, tile, sums);
}

// Calls use(grad_y, taps, tap of this pixel) for the windows that a pixel of x is in, if any, and for others with a tap that
// no window has.
template <typename Traits, typename scalar_t, typename Use>
__device__ __forceinline__ void for_each_window(const Pool& pool, const Pixels<Traits>& pixels, const scalar_t* grad_y,
                                                const uint8_t* taps, int row, int column, Use use) {
  const int last_row = (row + pool.padding.h) / pool.stride.h, last_column = (column + pool.padding.w) / pool.stride.w;
  const int rows = (pool.kernel.h - 1) / pool.stride.h + 1, columns = (pool.kernel.w - 1) / pool.stride.w + 1;
  int i = 0, j = 0;  // rows above the last window, columns before it
  for (int left_over = rows * columns; left_over > 0; left_over -= kWindowBatch) {
    typename Traits::Vector grads[kWindowBatch];
    Vec<uint8_t, Traits::kVec> found[kWindowBatch];
    int64_t offset[kWindowBatch];
    int wanted[kWindowBatch];
#pragma unroll
    for (int slot = 0; slot < kWindowBatch; ++slot) {
      const int y = inside(last_row - i, pool.out.h), x = inside(last_column - j, pool.out.w);
      const int tap_row = row + pool.padding.h - y * pool.stride.h, tap_column = column + pool.padding.w - x * pool.stride.w;
      const bool is_in = y == last_row - i && x == last_column - j && tap_row < pool.kernel.h && tap_column < pool.kernel.w;
      wanted[slot] = is_in ? tap_row * pool.kernel.w + tap_column : kNoTap + 1;
      offset[slot] = pixels.pixel(y, x);
      grads[slot] = load<Traits::kVec>(grad_y + offset[slot]);
      j = j + 1 < columns ? j + 1 : 0;
      i += j == 0;  // beyond the last row of windows the pixel is in none
    }
#pragma unroll
    for (int slot = 0; slot < kWindowBatch; ++slot) found[slot] = load_bytes<Traits::kVec>(taps + offset[slot]);
#pragma unroll
    for (int slot = 0; slot < kWindowBatch; ++slot) use(grads[slot], found[slot], wanted[slot]);
  }
}

// Rows of the table beyond those of the affine part.
enum GradientRow { kMeanDz = kAffineRows, kSlope, kGradientRows };

template <typename Traits>
__global__ void __launch_bounds__(kThreads)
    bn_act_maxpool_backward_input_kernel(const __grid_constant__ BnActMaxpoolBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  constexpr int kVec = Traits::kVec;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* grad_y = static_cast<const scalar_t*>(p.bn.grad_y);
  auto* grad_x = static_cast<scalar_t*>(p.bn.grad_x);
  const Tile tile(p.input, true);
  float table[kGradientRows][Traits::kLanes];
  load_table(tile, table, Traits{}, [&](int64_t c, float* entry) {
    fill_affine(p.bn, c, entry);
    entry[kMeanDz] = p.bn.training ? p.bn.correction[c] : 0.0f;
    entry[kSlope] = p.bn.training ? p.bn.correction[p.input.channels + c] : 0.0f;
  });

  const Pixels<Traits> in(p.input, tile, p.pool.in), out(p.input, tile, p.pool.out);
  for (PixelWalk<Traits> at(p.input, tile, p.pool.in); at; at.next()) {
    const int64_t offset = in.image(at.image) + in.pixel(at.row, at.column), image = out.image(at.image);
    const auto x_in = load<kVec>(x + offset);
    float dz[kVec] = {};
    for_each_window(p.pool, out, grad_y + image, p.taps + image, at.row, at.column,
                    [&](const auto& grads, const auto& taps, int wanted) {
#pragma unroll
                      for (int j = 0; j < kVec; ++j) dz[j] += taps.v[j] == wanted ? to_float(grads.v[j]) : 0.0f;
                    });
    float dx[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {  // statistics that are constants: an infinite x has no part in the gradient
      dx[j] = p.bn.training ? normalise_grad(dz[j], to_float(x_in.v[j]), table[kMean][j], table[kScale][j],
                                             table[kMeanDz][j], table[kSlope][j])
                            : dz[j] * table[kScale][j];
    }
    store(grad_x + offset, dx);
  }
}

cudaError_t launch_bn_act_maxpool_backward(const BnActMaxpoolBackwardParams& params, cudaStream_t stream) {
  cudaError_t status = with_pool_traits(params.bn.dtype, params.bn.geometry, [&](auto traits) {
    return launch_bn(bn_act_maxpool_backward_reduce_kernel<decltype(traits)>, params.bn.geometry, params, stream);
  });
  if (status == cudaSuccess) status = launch_bn_backward_merge(params.bn, stream);
  if (status != cudaSuccess) return status;
  return with_pool_traits(params.bn.dtype, params.input, [&](auto traits) {
    return launch_bn(bn_act_maxpool_backward_input_kernel<decltype(traits)>, params.input, params, stream);
  });
}

}  // namespace fastres::cuda
