// What sm90_conv_wide_kernel.cu finds beside its output, of every 256 places and channel, for the batch norm behind the convolution
// or before it: two numbers, in a fixed order, of values as they are stored.
#pragma once

#include "cuda/device/sm90_wide_finish.cuh"

namespace fastres::cuda::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// Writes two numbers of each of the two channels that the lane holds: of a quad's lanes one writes the first, one the second.
__device__ __forceinline__ void write_sums(const Outputs& p, int place, int channel, int lane, const float (&of)[2][2]) {
  const int part = place / kGroupPlaces, which = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = channel + lane / 4 + 8 * i;
    if (which < 2 && row < p.channels_out)
      p.sums[(int64_t{2} * part + which) * p.channels_out + row] = which == 0 ? of[i][0] : of[i][1];
  }
  sync_warp();  // products want their lanes together
}

// To y's type and back. Two at a time: one at a time the compiler, for float16, no longer keeps products under way.
template <typename scalar_t>
__device__ __forceinline__ void round_all(float (&acc)[128]) {
#pragma unroll
  for (int i = 0; i < 128; i += 2) {
    const float two[2] = {acc[i], acc[i + 1]};
    const Vec<scalar_t, 2> pair = rounded<scalar_t>(two);
    acc[i] = to_float(pair.v[0]), acc[i + 1] = to_float(pair.v[1]);
  }
}

// Which of the warp's places are pixels: those of the lane's columns at the bits 8 (j % 4) + k, and how many all are.
struct Inside {
  static constexpr int kWords = kGroupPlaces / 32;
  uint32_t own[kWords];
  int count = 0;

  __device__ Inside(const Outputs& p, int place, int lane) {
    Walk walk(p, place + lane);
#pragma unroll
    for (int i = 0; i < kWords; ++i, walk.advance(32)) {
      const uint32_t all = vote(walk.pixel() >= 0);
      count += count_bits(all);
      own[i] = all >> 2 * (lane % 4);
    }
  }
  __device__ bool has(int j, int k) const { return own[j / 4] >> (8 * (j % 4) + k) & 1; }
};

// Writes mean and squared deviations of the two channels that the lane holds, of the pixels among the warp's places. Sums are
// in a fixed order, and of so small a part of each value that they cannot overflow; of equal values the mean is that value.
__device__ __forceinline__ void write_statistics(const Outputs& p, int place, int channel, int lane, const float (&acc)[128]) {
  constexpr float kPart = 1.0f / kGroupPlaces;
  const Inside inside(p, place, lane);
  float mean[2], squares[2], sums[2][2] = {};  // [channel][k]
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (inside.has(j, k)) {
        sums[0][k] = fmaf(acc[4 * j + k], kPart, sums[0][k]);
        sums[1][k] = fmaf(acc[4 * j + 2 + k], kPart, sums[1][k]);
      }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    mean[i] = sum_of_quad(sums[i][0] + sums[i][1]) / (inside.count * kPart);
    if (inside.count == 0) mean[i] = 0.0f;
    sums[i][0] = sums[i][1] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < 32; ++j)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (inside.has(j, k)) {
        const float first = acc[4 * j + k] - mean[0], second = acc[4 * j + 2 + k] - mean[1];
        sums[0][k] = fmaf(first, first, sums[0][k]);
        sums[1][k] = fmaf(second, second, sums[1][k]);
      }
#pragma unroll
  for (int i = 0; i < 2; ++i) squares[i] = sum_of_quad(sums[i][0] + sums[i][1]);
  if (channel == 0 && lane == 0) p.counts[place / kGroupPlaces] = static_cast<float>(inside.count);
  const float both[2][2] = {{mean[0], squares[0]}, {mean[1], squares[1]}};
  write_sums(p, place, channel, lane, both);
}

// Gradients of a batch norm's output behind its activation: stops those that the ReLU stopped, and sums what is stored, by itself
// and times its x less the mean, of the pixels among the warp's places, in a fixed order. With one sum for both k, or selects in the
// place of branches, registers spill.
template <typename scalar_t>
struct Gradient {
  static constexpr bool kSums = true;
  float affine[2][kAffineRows] = {}, sums[2][2][2] = {};  // [channel][of dz, of dz times x][k]
  bool relu;

  __device__ Gradient(const Outputs& p, int channel, int lane) : relu(p.relu) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = channel + lane / 4 + 8 * i;
      if (row < p.channels_out) fill_affine(p.norm, row, affine[i]);
    }
  }
  __device__ static constexpr bool reads() { return true; }
  // inside: bit 2 k, whether the place is a pixel.
  __device__ Vec<scalar_t, 2> operator()(const float (&v)[2], const Vec<scalar_t, 2>& x, int i, uint32_t inside) {
    float dz[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float z = normalise(to_float(x.v[k]), affine[i][kMean], affine[i][kScale], affine[i][kBias]);
      dz[k] = masked<scalar_t>(v[k], z, relu);
    }
    const Vec<scalar_t, 2> stored = rounded<scalar_t>(dz);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      if (inside >> 2 * k & 1) {
        const float own = to_float(stored.v[k]);
        sums[i][0][k] += own;
        sums[i][1][k] = fmaf(own, to_float(x.v[k]) - affine[i][kMean], sums[i][1][k]);
      }
    return stored;
  }
  __device__ void write(const Outputs& p, int place, int channel, int lane) const {
    float of_quad[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int which = 0; which < 2; ++which) of_quad[i][which] = sum_of_quad(sums[i][which][0] + sums[i][which][1]);
    write_sums(p, place, channel, lane, of_quad);
  }
};

#endif

}  // namespace fastres::cuda::wide
