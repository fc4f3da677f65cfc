// Windows of 3x3 with stride 2 and padding 1 before a ReLU, vectors of channels, channels_last, images of fewer than 2^31
// elements: a thread walks down a strip of one column of y, and keeps of a row of x what the next windows need.
#pragma once

#include "cuda/device/pool.cuh"

namespace fastres::cuda {

// The x and the position in its window of a maximum, in one word where x has 16 bits.
template <typename scalar_t>
struct Mark {
  uint32_t bits;

  __device__ Mark() = default;
  __device__ Mark(scalar_t x, int tap) {
    uint16_t of_x;
    memcpy(&of_x, &x, 2);
    bits = static_cast<uint32_t>(of_x) << 16 | tap;
  }
  __device__ void add_to_tap(int more) { bits += more; }
  __device__ int tap() const { return bits & 0xffff; }
  __device__ float x() const {
    const auto of_x = static_cast<uint16_t>(bits >> 16);
    scalar_t x;
    memcpy(static_cast<void*>(&x), &of_x, 2);
    return to_float(x);
  }
};

template <>
struct Mark<float> {
  float value;
  int position;

  __device__ Mark() = default;
  __device__ Mark(float x, int tap) : value(x), position(tap) {}
  __device__ void add_to_tap(int more) { position += more; }
  __device__ int tap() const { return position; }
  __device__ float x() const { return value; }
};

// The maxima of some pixels of kVec windows, rounded, before the ReLU: it changes neither which of those above zero comes
// first nor a NaN, and stops the rest.
template <typename Traits>
struct MarkedMaxima {
  using scalar_t = typename Traits::scalar_t;
  float value[Traits::kVec];
  Mark<scalar_t> mark[Traits::kVec];

  __device__ MarkedMaxima() = default;
  __device__ MarkedMaxima(const typename Traits::Vector& x, const typename Traits::Vector& z, int tap) {
#pragma unroll
    for (int j = 0; j < Traits::kVec; ++j) {
      value[j] = to_float(z.v[j]);
      mark[j] = {x.v[j], tap};
    }
  }

  __device__ void add_rows(int rows) {
#pragma unroll
    for (int j = 0; j < Traits::kVec; ++j) mark[j].add_to_tap(3 * rows);
  }

  // Pixels that come after all of these.
  __device__ void merge(const MarkedMaxima& later) {
#pragma unroll
    for (int j = 0; j < Traits::kVec; ++j) {
      if (!replaces(later.value[j], value[j])) continue;
      value[j] = later.value[j];
      mark[j] = later.mark[j];
    }
  }
};

// The same without their places: of zeros of either sign the ReLU makes one.
template <typename Traits>
struct PlainMaxima {
  typename Traits::Vector value;

  __device__ PlainMaxima() = default;
  __device__ PlainMaxima(const typename Traits::Vector&, const typename Traits::Vector& z, int) : value(z) {}
  __device__ void add_rows(int) {}
  __device__ void merge(const PlainMaxima& later) { value = maximum(value, later.value); }
};

// The row of y behind the last one of a strip.
__device__ __forceinline__ int strip_end(const Pool& pool, int strip) {
  return strip + 1 < pool.strips ? (strip + 1) * pool.strip_rows : pool.out.h;
}

// The strip of one thread.
template <typename Traits>
class Strip {
 public:
  using scalar_t = typename Traits::scalar_t;
  using Affine = float[kAffineRows][Traits::kLanes];
  struct Row {
    typename Traits::Vector in[3];
    int row;
  };

  const int first, last;  // rows of y, without the last

  // image: of x.
  __device__ Strip(const Pool& pool, const Pixels<Traits>& pixels, const scalar_t* image, int strip, int column)
      : first(strip * pool.strip_rows), last(strip_end(pool, strip)), height_(pool.in.h), image_(image),
        row_size_(pixels.near(1, 0)) {
    const int left = 2 * column - 1;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int x = inside(left + i, pool.in.w);
      column_[i] = pixels.near(0, x);
      tap_[i] = x - left;
    }
  }

  // Calls fetch(row of y) ahead of use(row of y, maxima of its windows), row by row.
  template <typename Maxima, typename Fetch, typename Use>
  __device__ __forceinline__ void walk(const Affine& affine, Fetch fetch_more, Use use) const {
    Row low = fetch(2 * first - 1);
    int above = low.row - (2 * first - 1);  // rows of the window over the ones that `best` is of
    Maxima best = maxima<Maxima>(low, affine);
    for (int row = first; row < last; ++row) {
      const Row middle = fetch(2 * row);
      low = fetch(2 * row + 1);
      fetch_more(row);
      best.add_rows(above);
      Maxima next = maxima<Maxima>(middle, affine);
      next.add_rows(1);
      best.merge(next);
      const Maxima below = maxima<Maxima>(low, affine);
      next = below;
      next.add_rows(low.row - (2 * row - 1));
      best.merge(next);
      use(row, best);
      best = below;
      above = 0;
    }
  }

 private:
  // Three pixels of a row of x, or of the row next to the border.
  __device__ Row fetch(int row) const {
    Row out;
    out.row = inside(row, height_);
#pragma unroll
    for (int i = 0; i < 3; ++i) out.in[i] = load<Traits::kVec>(image_ + (out.row * row_size_ + column_[i]));
    return out;
  }

  // Their maxima, in the window of that row of y.
  template <typename Maxima>
  __device__ Maxima maxima(const Row& row, const Affine& affine) const {
    Maxima best;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      float z[Traits::kVec];
#pragma unroll
      for (int j = 0; j < Traits::kVec; ++j)
        z[j] = normalise(to_float(row.in[i].v[j]), affine[kMean][j], affine[kScale][j], affine[kBias][j]);
      const Maxima pixel(row.in[i], rounded<scalar_t>(z), tap_[i]);
      if (i == 0) best = pixel;
      else best.merge(pixel);
    }
    return best;
  }

  int height_;
  const scalar_t* image_;
  int row_size_, column_[3], tap_[3];
};

// Calls use(image, strip, column) for the strips of one thread: a few, so that it divides for each and keeps little.
template <typename Traits, typename Use>
__device__ __forceinline__ void for_each_strip(const BnGeometry& g, const Tile& tile, const Pool& pool, Use use) {
  if (static_cast<int>(threadIdx.x) * Traits::kLanes >= tile.channels) return;  // a thread beyond the last channel
  const int64_t first = tile.split * g.share, plane = int64_t{pool.strips} * pool.out.w;
  const int64_t end = first + g.share < g.positions ? first + g.share : g.positions;
  for (int64_t position = first + threadIdx.y; position < end; position += blockDim.y) {
    const int64_t image = position / plane;
    const int in_image = static_cast<int>(position - image * plane);
    use(image, in_image / pool.out.w, in_image % pool.out.w);
  }
}

// Calls f(BnTraits{}): vectors of channels.
template <typename F>
cudaError_t with_strip_traits(DType dtype, F f) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    return f(BnTraits<scalar_t, 16 / sizeof(scalar_t), true>{});
  });
}

}  // namespace fastres::cuda
