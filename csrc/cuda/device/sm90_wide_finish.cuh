// The end of a tile of sm90_conv_wide_kernel.cu: how the accumulators of a warpgroup, 64 channels by 256 places, become y. A warp
// lays out its own 16 channels by itself.
#pragma once

#include "common/epilogue.h"
#include "cuda/device/batch_norm.cuh"
#include "cuda/device/sm90_wide.cuh"
#include "cuda/images.h"

namespace fastres::cuda::wide {

using namespace sm90;

constexpr int kGroupPlaces = 256;
constexpr int kChunk = 32;                       // places that a warp lays out at a time
constexpr int kWarpChannels = 16, kVec = 8;      // of a warp; of a 16-byte access

// A batch norm as it was in training.
struct Norm {
  ChannelVector weight, bias, mean, var;
  float eps;
};

// Where places lie and what is written of them.
struct Outputs {
  int rows, columns;  // of places, of one image
  Images out;
  int channels_out;
  bool relu;
  const float* bias;
  const void* read;   // beside y and of its size, or null: the residual, or the input of the batch norm before the convolution
  void* y;
  Norm norm;
  float* sums;    // two of each part of the places and channel, [parts, 2, channels_out]
  float* counts;  // statistics: of how many values, [parts]
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// The output pixel at a place, or none.
struct Walk {
  const Outputs& p;
  int column, line, pixel_row;  // the place's, line of the image; pixel_row: of all images, without the zeros

  __device__ Walk(const Outputs& p, int place) : p(p) {
    const int row = place / p.columns, image = row / p.rows;
    column = place - row * p.columns;
    line = row - image * p.rows;
    pixel_row = image * p.out.height + line;
  }
  __device__ int pixel() const {
    const bool inside = column < p.out.width && line < p.out.height && pixel_row < p.out.count * p.out.height;
    return inside ? pixel_row * p.out.width + column : -1;
  }
  __device__ void advance(int places) {
    for (column += places; column >= p.columns; column -= p.columns) {
      ++line, ++pixel_row;
      if (line == p.rows) line = 0, pixel_row -= p.rows - p.out.height;
    }
  }
};

// Of a chunk's places this lane loads and stores 16 bytes, half the warp's channels, at every 16th, from lane / 2 on.
struct Vectors {
  static constexpr int kCount = kChunk / 16;
  int pixel[kCount];  // negative for none
  uint4 read[kCount];
  uint32_t inside[kCount];  // where it is asked for: two bits for each of 16 places, set where it is a pixel

  template <bool kInside>
  __device__ void next(const Outputs& p, bool reads, Walk& walk, int channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, walk.advance(16)) {
      const int place = walk.pixel();
      if constexpr (kInside) inside[i] = vote(place >= 0);
      pixel[i] = channel < p.channels_out ? place : -1;
      read[i] = uint4{0, 0, 0, 0};
      if (reads && pixel[i] >= 0) read[i] = load_16_bytes(static_cast<const __half*>(p.read) + offset(p, i, channel));
    }
  }
  __device__ int64_t offset(const Outputs& p, int i, int channel) const {
    return static_cast<int64_t>(pixel[i]) * p.channels_out + channel;
  }
};

// Where 8 channels of a place lie in a warp's chunk: rows of 32 bytes, halves changed every four, so that the eight rows of a
// matrix, and eight lanes' vectors, hit every bank once.
__device__ __forceinline__ uint8_t* spot(uint8_t* out, int place, int half) {
  return out + place * kWarpChannels * 2 + ((half ^ (place / 4 % 2)) * 16);
}

// Values as they are.
template <typename scalar_t>
struct Plain {
  static constexpr bool kSums = false;

  __device__ Plain(const Outputs&, int, int) {}
  __device__ static constexpr bool reads() { return false; }
  __device__ Vec<scalar_t, 2> operator()(const float (&v)[2], const Vec<scalar_t, 2>&, int, uint32_t) const {
    return rounded<scalar_t>(v);
  }
};

// Adds bias and residual and applies the ReLU.
template <typename scalar_t>
struct Folded {
  static constexpr bool kSums = false;
  float bias[2];
  bool adds, relu;

  __device__ Folded(const Outputs& p, int channel, int lane) : adds(p.read != nullptr), relu(p.relu) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = channel + lane / 4 + 8 * i;
      bias[i] = row < p.channels_out ? p.bias[row] : 0.0f;
    }
  }
  __device__ bool reads() const { return adds; }
  __device__ Vec<scalar_t, 2> operator()(const float (&v)[2], const Vec<scalar_t, 2>& residual, int i, uint32_t) const {
    float y[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      y[k] = v[k] + bias[i];
      if (adds) y[k] += to_float(residual.v[k]);
      if (relu) y[k] = gpu_relu(y[k]);
    }
    return rounded<scalar_t>(y);
  }
};

// Rounds what change(two values, what is read beside them, channel of the lane, ...) makes of the accumulators, turns channels by
// places round and stores them.
template <typename scalar_t, typename Change>
__device__ __forceinline__ void finish(const Outputs& p, uint8_t* out, int place, int channel, int lane, const float (&acc)[128],
                                       Change& change) {
  const bool reads = change.reads();
  const int half = lane % 2;
  Walk walk(p, place + lane / 2);
  Vectors now, ahead;
  ahead.next<Change::kSums>(p, reads, walk, channel + half * kVec);
#pragma unroll
  for (int chunk = 0; chunk < kGroupPlaces / kChunk; ++chunk) {
    now = ahead;
    if (reads) {
#pragma unroll
      for (int i = 0; i < Vectors::kCount; ++i)
        *reinterpret_cast<uint4*>(spot(out, 16 * i + lane / 2, half)) = now.read[i];
      sync_warp();
    }
    if (chunk + 1 < kGroupPlaces / kChunk) ahead.next<Change::kSums>(p, reads, walk, channel + half * kVec);
#pragma unroll
    for (int pair = 0; pair < kChunk / 16; ++pair) {  // of 8 places each
      uint8_t* row = spot(out, 16 * pair + lane / 16 * 8 + lane % 8, lane / 8 % 2);
      uint32_t m[4] = {}, inside = 0;
      if (reads) load_transposed(m, row);
      if constexpr (Change::kSums) inside = now.inside[pair] >> 4 * (lane % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = chunk * (kChunk / 8) + 2 * pair + i / 2, first = 4 * j + 2 * (i % 2);
        const float two[2] = {acc[first], acc[first + 1]};
        Vec<scalar_t, 2> value;
        memcpy(static_cast<void*>(&value), m + i, 4);
        value = change(two, value, i % 2, inside >> 16 * (i / 2));
        memcpy(m + i, static_cast<const void*>(&value), 4);
      }
      store_transposed(row, m);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < Vectors::kCount; ++i)
      if (now.pixel[i] >= 0)
        *reinterpret_cast<uint4*>(static_cast<scalar_t*>(p.y) + now.offset(p, i, channel + half * kVec)) =
            *reinterpret_cast<const uint4*>(spot(out, 16 * i + lane / 2, half));
    sync_warp();
  }
}

#endif

}  // namespace fastres::cuda::wide
