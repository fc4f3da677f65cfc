// What the batch-norm kernels share on the device: who owns which elements, and the parameters of a block's channels.
#pragma once

#include "cuda/bn_args.h"
#include "cuda/device/math.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/relu_mask.h"

namespace fastres::cuda {

// kLanes: channels that a vector spans.
template <typename scalar_type, int kVecSize, bool kLast>
struct BnTraits {
  using scalar_t = scalar_type;
  static constexpr int kVec = kVecSize;
  static constexpr bool kChannelsLast = kLast;
  static constexpr int kLanes = kLast ? kVecSize : 1;
  using Vector = Vec<scalar_t, kVec>;

  __device__ static constexpr int lane(int j) { return kLast ? j : 0; }  // of element j of a vector
};

// Calls f(BnTraits{}) for the dtype, vector size and layout at hand.
template <typename F>
cudaError_t with_bn_traits(DType dtype, const BnGeometry& g, F f) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    constexpr int kVec = 16 / sizeof(scalar_t);
    if (g.channels_last) return g.vec > 1 ? f(BnTraits<scalar_t, kVec, true>{}) : f(BnTraits<scalar_t, 1, true>{});
    return g.vec > 1 ? f(BnTraits<scalar_t, kVec, false>{}) : f(BnTraits<scalar_t, 1, false>{});
  });
}

// The same for the vectors whose bits are a byte of a mask.
template <typename F>
cudaError_t with_mask_traits(DType dtype, const BnGeometry& g, F f) {
  return with_dtype(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    return g.channels_last ? f(BnTraits<scalar_t, kMaskVec, true>{}) : f(BnTraits<scalar_t, kMaskVec, false>{});
  });
}

// Runs a forward pass by f(traits, whether it writes the mask); makes the mask from y where that cannot. p: its params, of
// bn_add_act or of the first norm of two.
template <typename Params, typename F>
cudaError_t with_mask_beside(const Params& p, cudaStream_t stream, F f) {
  if (p.mask != nullptr && p.geometry.vec == kMaskVec)
    return with_mask_traits(p.dtype, p.geometry, [&](auto traits) { return f(traits, std::true_type{}); });
  const cudaError_t status =
      with_bn_traits(p.dtype, p.geometry, [&](auto traits) { return f(traits, std::false_type{}); });
  if (status != cudaSuccess || p.mask == nullptr) return status;
  return launch_relu_mask({p.dtype, p.geometry.elements * p.geometry.channels, p.y, p.mask}, stream);
}

template <typename Params>
cudaError_t launch_bn(void (*kernel)(Params), const BnGeometry& g, const Params& params, cudaStream_t stream) {
  return launch(kernel, dim3(static_cast<unsigned>(g.blocks())), dim3(g.block_x, g.block_y), params, stream);
}

// The same behind the merge of a reduction.
template <typename Params>
cudaError_t launch_bn_behind(void (*kernel)(Params), const BnGeometry& g, const Params& params, cudaStream_t stream) {
  return launch_behind(kernel, dim3(static_cast<unsigned>(g.blocks())), dim3(g.block_x, g.block_y), params, stream);
}

// The channels and the split of this block. Tiles are innermost, so that neighbouring blocks touch neighbouring memory.
// Reductions walk memory forwards and the passes after them backwards, from what is still in the L2 cache.
struct Tile {
  int64_t channel;  // first
  int channels;
  int64_t split;

  __device__ Tile(const BnGeometry& g, bool backwards) {
    const unsigned block = backwards ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    const unsigned tiles = static_cast<unsigned>(g.tiles);
    split = block / tiles;
    channel = static_cast<int64_t>(block % tiles) * g.tile_channels;
    const int64_t left = g.channels - channel;
    channels = left < g.tile_channels ? static_cast<int>(left) : g.tile_channels;
  }
};

// Offsets of the vectors of one thread: every blockDim.y-th position of the block's share.
template <typename Traits>
class Walk {
 public:
  __device__ Walk(const BnGeometry& g, const Tile& tile) {
    const int64_t first = tile.split * g.share, position = first + threadIdx.y, step = blockDim.y;
    int64_t end = first + g.share < g.positions ? first + g.share : g.positions;
    const int lane = threadIdx.x * Traits::kLanes;
    if (lane >= tile.channels) end = first;  // a thread beyond the last channel
    left_ = (static_cast<int>(end - position) + blockDim.y - 1) / blockDim.y;
    if constexpr (Traits::kChannelsLast) {
      offset_ = position * g.channels + tile.channel + lane;
      offset_step_ = step * g.channels;
    } else {
      row_ = g.plane / Traits::kVec;
      const int64_t image = position / row_;
      inner_ = position - image * row_;
      inner_step_ = step % row_;
      offset_ = (image * g.channels + tile.channel) * g.plane + inner_ * Traits::kVec;
      offset_step_ = step / row_ * g.channels * g.plane + inner_step_ * Traits::kVec;
      next_image_ = (g.channels - 1) * g.plane;
    }
  }

  __device__ bool has(int count) const { return left_ >= static_cast<unsigned>(count); }

  __device__ int64_t next() {
    const int64_t offset = offset_;
    --left_;
    offset_ += offset_step_;
    if constexpr (!Traits::kChannelsLast) {
      inner_ += inner_step_;
      if (inner_ >= row_) {
        inner_ -= row_;
        offset_ += next_image_;
      }
    }
    return offset;
  }

 private:
  unsigned left_;  // a block's share is counted in 32 bits
  int64_t offset_, offset_step_;
  int64_t row_, inner_, inner_step_, next_image_;  // contiguous: vectors per plane, index therein
};

// Asks for the first vectors of these operands, to be on their way while a block makes its table.
template <typename Traits, typename... T>
__device__ __forceinline__ void prefetch_first(Walk<Traits> walk, const T*... operands) {
#pragma unroll
  for (int slot = 0; slot < kUnroll; ++slot)
    if (walk.has(1)) {
      const int64_t offset = walk.next();
      (prefetch(operands + offset), ...);
    }
}

// Calls fetch(slot, offset) for kSlots vectors, then use(slot, offset) for each: their loads are in flight together.
template <int kSlots, typename Traits, typename Fetch, typename Use>
__device__ __forceinline__ void for_each_vector(Walk<Traits> walk, Fetch fetch, Use use) {
  while (walk.has(kSlots)) {
    int64_t offset[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      offset[slot] = walk.next();
      fetch(slot, offset[slot]);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) use(slot, offset[slot]);
  }
  while (walk.has(1)) {
    const int64_t offset = walk.next();
    fetch(0, offset);
    use(0, offset);
  }
}

__device__ __forceinline__ float channel_value(const ChannelVector& vector, int64_t channel, float if_absent) {
  if (vector.data == nullptr) return if_absent;
  switch (vector.dtype) {
    case DType::kFloat32: return static_cast<const float*>(vector.data)[channel];
    case DType::kFloat16: return to_float(static_cast<const __half*>(vector.data)[channel]);
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(vector.data)[channel]);
    default: return static_cast<float>(static_cast<const double*>(vector.data)[channel]);
  }
}

__device__ __forceinline__ void set_channel_value(void* data, DType dtype, int64_t channel, float value) {
  switch (dtype) {
    case DType::kFloat32: static_cast<float*>(data)[channel] = value; break;
    case DType::kFloat16: static_cast<__half*>(data)[channel] = from_float<__half>(value); break;
    case DType::kBFloat16: static_cast<__nv_bfloat16*>(data)[channel] = from_float<__nv_bfloat16>(value); break;
    default: static_cast<double*>(data)[channel] = value;
  }
}

// A block computes each value of its channels once, with fill(channel, entry); a thread keeps those of its vectors.
template <int kRows, typename Traits, typename Fill>
__device__ __forceinline__ void load_table(const Tile& tile, float (&own)[kRows][Traits::kLanes], Traits, Fill fill) {
  __shared__ float table[kRows][kTileChannels];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = thread; i < tile.channels; i += blockDim.x * blockDim.y) {
    float entry[kRows];
    fill(tile.channel + i, entry);
#pragma unroll
    for (int row = 0; row < kRows; ++row) table[row][i] = entry[row];
  }
  __syncthreads();
  const int lane = threadIdx.x * Traits::kLanes;
  if (lane >= tile.channels) return;
#pragma unroll
  for (int row = 0; row < kRows; ++row)
#pragma unroll
    for (int j = 0; j < Traits::kLanes; ++j) own[row][j] = table[row][lane + j];
}

// Rows of the table that normalises: y = (x - mean) * scale + bias.
enum AffineRow { kMean, kScale, kBias, kAffineRows };

template <typename Params>
__device__ __forceinline__ void fill_affine(const Params& p, int64_t channel, float* entry) {
  const float invstd = inverse_std(channel_value(p.var, channel, 1.0f), p.eps);
  entry[kMean] = channel_value(p.mean, channel, 0.0f);
  entry[kScale] = channel_value(p.weight, channel, 1.0f) * invstd;
  entry[kBias] = channel_value(p.bias, channel, 0.0f);
}

// The bits of a vector, which lies at `offset`, and following ones; none are read without a ReLU.
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t offset, bool relu) {
  return relu ? static_cast<unsigned>(load_bytes<1>(mask + offset / 8).v[0]) >> (offset % 8) : ~0u;
}

// The byte of a vector of values that are yet to be rounded to the output type.
template <typename scalar_t>
__device__ __forceinline__ void store_mask(uint8_t* mask, int64_t offset, const float (&z)[kMaskVec]) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < kMaskVec; ++j) bits |= (z[j] <= kRoundsToZero<scalar_t> ? 0u : 1u) << j;
  mask[offset / 8] = static_cast<uint8_t>(bits);
}

// The gradient behind the ReLU, with the mask of the forward pass: z is the value it rounded to the output type.
template <typename scalar_t>
__device__ __forceinline__ float masked(float grad_y, float z, bool relu) {
  return relu ? relu_gradient(grad_y, z, kRoundsToZero<scalar_t>) : grad_y;
}

}  // namespace fastres::cuda
