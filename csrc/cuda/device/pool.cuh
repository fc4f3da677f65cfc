// What the pooling kernels share: walks over pixels, and the windows they look into.
#pragma once

#include "cuda/bn_act_maxpool.h"
#include "cuda/device/batch_norm.cuh"

namespace fastres::cuda {

constexpr int kTapBatch = 5;     // loads in flight: a 3x3 window takes two batches, a 2x2 window one
constexpr int kWindowBatch = 4;  // windows of 3x3 with stride 2 that a pixel can be in

// A window looks at the pixel next to the border instead of at the padding. It holds that pixel anyway, and a pixel seen
// again, right after itself or with all its row, changes neither which maximum comes first nor which NaN comes last.
__device__ __forceinline__ int inside(int v, int size) { return v < 0 ? 0 : v < size ? v : size - 1; }

// Where the pixels of a thread's channels are in a tensor of this size.
template <typename Traits>
class Pixels {
 public:
  __device__ Pixels(const BnGeometry& g, const Tile& tile, PlaneSize size)
      : channels_(g.channels), channel_(tile.channel + threadIdx.x * Traits::kLanes), size_(size) {}

  __device__ int64_t image(int64_t n) const {
    const int64_t plane = int64_t{size_.h} * size_.w;
    if constexpr (Traits::kChannelsLast) return n * plane * channels_ + channel_;
    else return (n * channels_ + channel_) * plane;
  }

  // In its image.
  __device__ int64_t pixel(int row, int column) const {
    const int64_t pixel = int64_t{row} * size_.w + column;
    if constexpr (Traits::kChannelsLast) return pixel * channels_;
    else return pixel;
  }

  // The same, where an image is known to have fewer than 2^31 elements.
  __device__ int near(int row, int column) const {
    static_assert(Traits::kChannelsLast);
    return (row * size_.w + column) * static_cast<int>(channels_);
  }

 private:
  int64_t channels_, channel_;
  PlaneSize size_;
};

// The pixels of one thread: every blockDim.y-th of the block's share. Vectors of pixels that lie side by side (contiguous)
// would straddle windows, so that there a position is one element.
template <typename Traits>
class PixelWalk {
 public:
  int64_t image;
  int row, column;

  __device__ PixelWalk(const BnGeometry& g, const Tile& tile, PlaneSize size) : size_(size) {
    static_assert(Traits::kLanes == Traits::kVec);
    const int64_t first = tile.split * g.share;
    position_ = first + threadIdx.y;
    end_ = first + g.share < g.positions ? first + g.share : g.positions;
    const int lane = threadIdx.x * Traits::kLanes;
    if (lane >= tile.channels) end_ = first;  // a thread beyond the last channel
    const int64_t plane = int64_t{size.h} * size.w;
    image = position_ / plane;
    row = static_cast<int>(position_ % plane) / size.w;
    column = static_cast<int>(position_ % plane) % size.w;
    step_ = blockDim.y;
    image_step_ = static_cast<int>(step_ / plane);
    row_step_ = static_cast<int>(step_ % plane) / size.w;
    column_step_ = static_cast<int>(step_ % plane) % size.w;
  }

  __device__ explicit operator bool() const { return position_ < end_; }

  __device__ void next() {
    position_ += step_;
    image += image_step_;
    row += row_step_;
    column += column_step_;
    if (column >= size_.w) {
      column -= size_.w;
      ++row;
    }
    if (row >= size_.h) {
      row -= size_.h;
      ++image;
    }
  }

 private:
  PlaneSize size_;
  int64_t position_, end_, step_;
  int image_step_, row_step_, column_step_;
};

// Calls use(vector, tap) for the pixels under one window, in order; the last batch repeats the last pixel.
template <typename Traits, typename scalar_t, typename Use>
__device__ __forceinline__ void for_each_tap(const Pool& pool, const Pixels<Traits>& pixels, const scalar_t* image, int row,
                                             int column, Use use) {
  const int top = row * pool.stride.h - pool.padding.h, left = column * pool.stride.w - pool.padding.w;
  int kernel_row = 0, kernel_column = 0;
  for (int left_over = pool.kernel.h * pool.kernel.w; left_over > 0; left_over -= kTapBatch) {
    typename Traits::Vector in[kTapBatch];
    int tap[kTapBatch];
#pragma unroll
    for (int i = 0; i < kTapBatch; ++i) {
      const int y = inside(top + kernel_row, pool.in.h), x = inside(left + kernel_column, pool.in.w);
      in[i] = load<Traits::kVec>(image + pixels.pixel(y, x));
      tap[i] = (y - top) * pool.kernel.w + x - left;
      if (kernel_column + 1 < pool.kernel.w) {
        ++kernel_column;
      } else if (kernel_row + 1 < pool.kernel.h) {
        kernel_column = 0;
        ++kernel_row;
      }
    }
#pragma unroll
    for (int i = 0; i < kTapBatch; ++i) use(in[i], tap[i]);
  }
}

// act(bn(x)) rounded as it would be stored: maxima of rounded values tie more often.
template <typename scalar_t>
__device__ __forceinline__ float activated(float x, float mean, float scale, float bias, bool is_relu) {
  const float z = normalise(x, mean, scale, bias);
  return to_float(from_float<scalar_t>(is_relu ? gpu_relu(z) : z));
}

// Whether a pixel takes the place of one before it in the window: the first maximum stays, the last NaN wins.
__device__ __forceinline__ bool replaces(float later, float earlier) { return later > earlier || later != later; }

// The maxima of kVec windows as torch.max_pool2d finds them: the first one, or the last NaN.
template <int kVec>
struct Maxima {
  float value[kVec];
  int tap[kVec];

  __device__ Maxima() {
#pragma unroll
    for (int j = 0; j < kVec; ++j) tap[j] = -1;
  }

  __device__ bool replace(int j, float candidate, int position) {
    const bool better = tap[j] < 0 || replaces(candidate, value[j]);
    if (better) {
      value[j] = candidate;
      tap[j] = position;
    }
    return better;
  }
};

// Calls f(BnTraits{}): vectors of channels, or single elements.
template <typename F>
cudaError_t with_pool_traits(DType dtype, const BnGeometry& g, F f) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (!g.channels_last) return f(BnTraits<scalar_t, 1, false>{});
    return g.vec > 1 ? f(BnTraits<scalar_t, kVec, true>{}) : f(BnTraits<scalar_t, 1, true>{});
  });
}

}  // namespace fastres::cuda
