// Formula: a gradient goes to the maximum of its window where act passes it, dz is their sum; then as bn_act_backward from dz.
// Layout: channels_last or contiguous; a block owns channels and a share of the pixels, of grad_y (sums) or of x (grad_x).
// Bytes: sums read x and grad_y and write a byte per element of grad_y; grad_x reads x, grad_y and the bytes, and is written.
// Accumulate type: float, double between threads and blocks; the activation is rounded before it is compared, grad_x once.
// Invariants: each x gathers its gradients in a fixed order, without atomics; sums in a fixed order on any device.
#include "cuda/device/bn_backward.cuh"
#include "cuda/device/pool_strip.cuh"

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

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_maxpool_backward_strip_reduce_kernel(const __grid_constant__ BnActMaxpoolBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  constexpr int kVec = Traits::kVec;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* grad_y = static_cast<const scalar_t*>(p.bn.grad_y);
  const BnGeometry& g = p.bn.geometry;
  let_the_next_kernel_start();
  const Tile tile(g, false);
  float affine[kAffineRows][Traits::kLanes];
  load_table(tile, affine, Traits{}, [&](int64_t c, float* entry) { fill_affine(p.bn, c, entry); });

  const Pixels<Traits> in(g, tile, p.pool.in), out(g, tile, p.pool.out);
  GradientSums<kVec> sums{};
  for_each_strip<Traits>(g, tile, p.pool, [&](int64_t n, int strip, int column) {
    const auto* grads = grad_y + out.image(n);
    uint8_t* taps = p.taps + out.image(n);
    typename Traits::Vector grad_in;
    Strip<Traits>(p.pool, in, x + in.image(n), strip, column)
        .template walk<MarkedMaxima<Traits>>(
            affine, [&](int row) { grad_in = load<kVec>(grads + out.near(row, column)); },
            [&](int row, const MarkedMaxima<Traits>& best) {
              uint8_t found[kVec];
#pragma unroll
              for (int j = 0; j < kVec; ++j) {
                const bool stopped = best.value[j] <= 0.0f;
                const float dz = stopped ? 0.0f : to_float(grad_in.v[j]);
                found[j] = static_cast<uint8_t>(stopped ? kNoTap : best.mark[j].tap());
                sums.dz[j] += dz;
                sums.dzx[j] = fmaf(dz, best.mark[j].x() - affine[kMean][j], sums.dzx[j]);
              }
              store_bytes(taps + out.near(row, column), found);
            });
  });
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

// With statistics that are constants x has no part in its gradient, were it infinite.
__device__ __forceinline__ void fill_gradient(const BnActMaxpoolBackwardParams& p, int64_t channel, float* entry) {
  fill_affine(p.bn, channel, entry);
  if (!p.bn.training) entry[kMean] = 0.0f;
  entry[kMeanDz] = p.bn.training ? p.bn.correction[channel] : 0.0f;
  entry[kSlope] = p.bn.training ? p.bn.correction[p.input.channels + channel] : 0.0f;
}

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
  load_table(tile, table, Traits{}, [&](int64_t c, float* entry) { fill_gradient(p, c, entry); });

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

// Two windows side by side, as a strip of x two pixels wide needs them; one beyond the border has no tap.
template <typename Traits>
struct TwoWindows {
  typename Traits::Vector grads[2];
  uint32_t taps[2][Traits::kVec / 4];  // in bytes

  __device__ TwoWindows() = default;
  __device__ TwoWindows(const typename Traits::scalar_t* grad_y, const uint8_t* bytes, int right, bool is_in,
                        bool has_right) {
    grads[0] = load<Traits::kVec>(grad_y);
    grads[1] = load<Traits::kVec>(grad_y + right);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto found = load_bytes<Traits::kVec>(bytes + (i == 0 ? 0 : right));
      memcpy(taps[i], &found, sizeof(found));
    }
#pragma unroll
    for (int i = 0; i < Traits::kVec / 4; ++i) {
      if (!is_in) taps[0][i] = ~0u;
      if (!is_in || !has_right) taps[1][i] = ~0u;
    }
  }

  // The gradient that one of them gives to that pixel.
  __device__ float grad(int window, int j, unsigned tap) const {
    return (taps[window][j / 4] >> j % 4 * 8 & 0xff) == tap ? to_float(grads[window].v[j]) : 0.0f;
  }
};

template <typename Traits>
__global__ void __launch_bounds__(kThreads, 2)
    bn_act_maxpool_backward_strip_input_kernel(const __grid_constant__ BnActMaxpoolBackwardParams p) {
  using scalar_t = typename Traits::scalar_t;
  using Vector = typename Traits::Vector;
  constexpr int kVec = Traits::kVec;
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* grad_y = static_cast<const scalar_t*>(p.bn.grad_y);
  auto* grad_x = static_cast<scalar_t*>(p.bn.grad_x);
  const Pool& pool = p.pool;
  wait_for_the_kernel_before();
  const Tile tile(p.input, true);
  float table[kGradientRows][Traits::kLanes];
  load_table(tile, table, Traits{}, [&](int64_t c, float* entry) { fill_gradient(p, c, entry); });

  const Pixels<Traits> in(p.input, tile, pool.in), out(p.input, tile, pool.out);
  for_each_strip<Traits>(p.input, tile, pool, [&](int64_t n, int strip, int column) {
    const bool has_right = column + 1 < pool.out.w, is_wide = 2 * column + 1 < pool.in.w;
    const int right_window = has_right ? out.near(0, 1) : 0, right = is_wide ? in.near(0, 1) : 0;
    const int64_t image = in.image(n), out_image = out.image(n);

    const auto windows = [&](int row) {
      const int64_t offset = out_image + out.near(inside(row, pool.out.h), column);
      return TwoWindows<Traits>(grad_y + offset, p.taps + offset, right_window, row < pool.out.h, has_right);
    };
    const auto write = [&](int64_t offset, const Vector& x_in, auto gradient) {
      float dx[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float x_j = p.bn.training ? to_float(x_in.v[j]) : 0.0f;
        dx[j] = normalise_grad(gradient(j), x_j, table[kMean][j], table[kScale][j], table[kMeanDz][j], table[kSlope][j]);
      }
      store(grad_x + offset, dx);
    };

    const int first = strip * pool.strip_rows, last = strip_end(pool, strip);
    TwoWindows<Traits> above = windows(first);
    for (int row = first; row < last; ++row) {
      const TwoWindows<Traits> below = windows(row + 1);
      const bool is_high = 2 * row + 1 < pool.in.h;
      const int64_t upper = image + in.near(2 * row, 2 * column), lower = upper + (is_high ? in.near(1, 0) : 0);
      const Vector a = load<kVec>(x + upper), b = load<kVec>(x + upper + right);
      // Sums in the order of for_each_window. Each x is loaded one ahead: more would not fit in registers.
      write(upper, a, [&](int j) { return above.grad(0, j, 4); });
      const Vector c = load<kVec>(x + lower);
      if (is_wide) write(upper + right, b, [&](int j) { return above.grad(1, j, 3) + above.grad(0, j, 5); });
      const Vector d = load<kVec>(x + lower + right);
      if (is_high) write(lower, c, [&](int j) { return below.grad(0, j, 1) + above.grad(0, j, 7); });
      if (is_wide && is_high)
        write(lower + right, d, [&](int j) {
          return below.grad(1, j, 0) + below.grad(0, j, 2) + above.grad(1, j, 6) + above.grad(0, j, 8);
        });
      above = below;
    }
  });
}

cudaError_t launch_strips(const BnActMaxpoolBackwardParams& params, cudaStream_t stream) {
  return with_strip_traits(params.bn.dtype, [&](auto traits) {
    using Traits = decltype(traits);
    const BnGeometry& g = params.bn.geometry;
    cudaError_t status = launch_bn(bn_act_maxpool_backward_strip_reduce_kernel<Traits>, g, params, stream);
    if (status == cudaSuccess) status = launch_bn_backward_merge(params.bn, stream);
    if (status != cudaSuccess) return status;
    return launch_bn_behind(bn_act_maxpool_backward_strip_input_kernel<Traits>, g, params, stream);
  });
}

cudaError_t launch_bn_act_maxpool_backward(const BnActMaxpoolBackwardParams& params, cudaStream_t stream) {
  if (params.pool.strips > 0) return launch_strips(params, stream);
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
