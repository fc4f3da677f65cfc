// Formula: grad_weight = the sum over output pixels of grad_y times the window of x, for few input channels.
// Layout: a block walks its share of the parts of all images, by 64 output channels; it holds the rows of x under a part and a
// ring of tiles of 64 pixels of grad_y in shared memory. Its warps keep all of the gradient in registers: output channels by
// pairs of values of the windows, 8 pairs a tile, tiles dealt to the warps in turn.
// Bytes: grad_y and x once from memory, rows of x that parts share from L2; partial sums of each block, once.
// Accumulate type: float, pixels in order, then blocks in order; one rounding, to grad_weight's type.
// Invariants: the number of blocks and their shares depend on shapes alone; pixels beyond a part count as zero on both sides;
// values beside a row of a window are summed like others, and dropped.
#include "common/epilogue.h"
#include "cuda/conv.h"
#include "cuda/device/conv_rows.cuh"

namespace fastres::cuda {
namespace {

constexpr int kTilePixels = 64;
constexpr int kRing = 3;
constexpr int kTileBytes = 2 * kTilePixels * kConvChannels;
constexpr int kGroups = kConvChannels / 16;   // of output channels
constexpr int kPairTiles = 3;                 // of a warp: 8 pairs of values each
constexpr int kSums = kGroups * 2 * kPairTiles * 4;  // of a thread
constexpr int kBlockSums = kSums * kConvThreads;
constexpr int kMostRows = 4;                  // of a part
constexpr int64_t kStagedBytes = 32 << 10;
constexpr int64_t kMostBlocks = 396;          // three for each multiprocessor of an H200, and the same everywhere
constexpr int kMergeLanes = 32, kMergeSplits = 8;
static_assert(kPairTiles * kConvWarps * 16 >= kMostWindowRows * kMostRowValues);

struct Kernel {
  WindowParts parts;
  int64_t parts_of_all, shares;
  int channel_blocks, channels_out;
  const void* grad_y;
  const void* x;
  float* partial;  // [shares][channel_blocks][kSums][kConvThreads]
};

struct Merge {
  int64_t shares;
  int channel_blocks, channels_out, window_rows, values, lead, eighths;
  const float* partial;
  void* grad_weight;
};

// Pair number of a warp's tile and a column of it, over all rows of a window.
FASTRES_HD int pair_of(int warp, int tile, int column) { return 8 * (tile * kConvWarps + warp) + column; }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Copies a tile of grad_y, a pixel's 128 bytes in the order part ^ pixel % 8: rows of a matrix hit every bank once.
__device__ __forceinline__ void stage_tile(const Kernel& p, const Part& part, int first_pixel, int first_channel, uint8_t* tile) {
#pragma unroll
  for (int i = 0; i < kTilePixels * 8 / kConvThreads; ++i) {
    const int row = i * (kConvThreads / 8) + threadIdx.x / 8, vector = threadIdx.x % 8;
    const int pixel = first_pixel + row, channel = first_channel + 8 * vector;
    const bool inside = pixel < part.pixels() && channel < p.channels_out;
    const int64_t from = inside ? part.output(p.parts, pixel) * p.channels_out + channel : 0;
    copy_16_bytes(tile + row * 128 + (vector ^ row % 8) * 16, static_cast<const uint16_t*>(p.grad_y) + from, inside);
  }
}

// Adds the products of 16 pixels; grad_y: of these; left: pixels of the part from here on.
template <typename scalar_t, bool kEven>
__device__ __forceinline__ void add_pixels(float (&acc)[kGroups][2 * kPairTiles][4], const uint8_t* grad_y,
                                           const scalar_t* staged, const int* offsets, const int (&own)[kPairTiles],
                                           int tiles, int left) {
  const int lane = threadIdx.x % 32, t = lane % 4, row = lane / 16 * 8 + lane % 8;
  uint32_t a[kGroups][4];
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
    load_transposed(a[group], grad_y + row * 128 + ((2 * group + lane / 8 % 2) ^ row % 8) * 16);
  const int2 low = *reinterpret_cast<const int2*>(offsets + 2 * t), high = *reinterpret_cast<const int2*>(offsets + 8 + 2 * t);
#pragma unroll
  for (int tile = 0; tile < kPairTiles; ++tile) {
    if (tile >= tiles) continue;
    const scalar_t* x = staged + own[tile];
    uint32_t v[4] = {load_two<kEven>(x + low.x), load_two<kEven>(x + low.y), load_two<kEven>(x + high.x),
                     load_two<kEven>(x + high.y)};
    if (left < 16) {  // zero times what stands in a pixel that is not there may be NaN
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * (i / 2) + 2 * t + i % 2 >= left) v[i] = 0;
    }
    const uint32_t even[2] = {(v[0] & 0xffffu) | v[1] << 16, (v[2] & 0xffffu) | v[3] << 16};
    const uint32_t odd[2] = {v[0] >> 16 | (v[1] & 0xffff0000u), v[2] >> 16 | (v[3] & 0xffff0000u)};
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      warp_product<scalar_t>(acc[group][2 * tile], a[group], even[0], even[1]);
      warp_product<scalar_t>(acc[group][2 * tile + 1], a[group], odd[0], odd[1]);
    }
  }
}

#endif  // sm_80

template <typename scalar_t, int kEighths, bool kEven>
__global__ void __launch_bounds__(kConvThreads, 3) conv_rows_backward_kernel(const __grid_constant__ Kernel p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  uint8_t* ring = dynamic_memory();
  auto* staged = reinterpret_cast<scalar_t*>(ring + kRing * kTileBytes);
  auto* offsets = reinterpret_cast<int*>(staged + p.parts.staged_rows * p.parts.pitch);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, pairs = 4 * kEighths * p.parts.window.h.kernel;
  const int64_t share = blockIdx.x / p.channel_blocks;
  const int first_channel = static_cast<int>(blockIdx.x % p.channel_blocks) * kConvChannels;

  int own[kPairTiles], tiles = 0;  // where the pairs of this lane's columns begin, from a window's beginning on
#pragma unroll
  for (int tile = 0; tile < kPairTiles; ++tile) {
    const int pair = pair_of(warp, tile, g);
    own[tile] = pair < pairs ? pair / (4 * kEighths) * p.parts.pitch + pair % (4 * kEighths) * 2 : 0;
    tiles += pair_of(warp, tile, 0) < pairs;
  }
  float acc[kGroups][2 * kPairTiles][4] = {};
  const int64_t end = (share + 1) * p.parts_of_all / p.shares;
  for (int64_t number = share * p.parts_of_all / p.shares; number < end; ++number) {
    const Part part(p.parts, number);
    const int pixels = part.pixels(), count_of_tiles = (pixels + kTilePixels - 1) / kTilePixels;
    __syncthreads();  // the part before is done with
    stage_rows(p.parts, part, p.x, staged);
    tabulate<kTilePixels>(p.parts, part, offsets);
    for (int tile = 0; tile < kRing - 1; ++tile) {
      if (tile < count_of_tiles) stage_tile(p, part, tile * kTilePixels, first_channel, ring + tile * kTileBytes);
      commit_copies();
    }
    for (int tile = 0; tile < count_of_tiles; ++tile) {
      wait_for_copies<kRing - 2>();
      __syncthreads();  // this tile is there, and the one before is done with
      const int next = tile + kRing - 1;
      if (next < count_of_tiles) stage_tile(p, part, next * kTilePixels, first_channel, ring + next % kRing * kTileBytes);
      commit_copies();
      const uint8_t* grad_y = ring + tile % kRing * kTileBytes;
      for (int k = 0; k < kTilePixels && tile * kTilePixels + k < pixels; k += 16)
        add_pixels<scalar_t, kEven>(acc, grad_y + k * 128, staged, offsets + tile * kTilePixels + k, own, tiles,
                                    pixels - tile * kTilePixels - k);
    }
  }

  float* partial = p.partial + int64_t{blockIdx.x} * kBlockSums + threadIdx.x;
#pragma unroll
  for (int group = 0; group < kGroups; ++group)
#pragma unroll
    for (int i = 0; i < 2 * kPairTiles * 4; ++i)
      partial[(group * 2 * kPairTiles * 4 + i) * kConvThreads] = acc[group][i / 4][i % 4];
#endif
}

// A block sums 32 places of all shares, each of its rows every eighth share, then the rows in order.
template <typename scalar_t>
__global__ void __launch_bounds__(kMergeLanes * kMergeSplits) conv_rows_merge_kernel(const Merge p) {
  __shared__ float sums[kMergeSplits][kMergeLanes];
  const int blocks_of_sums = kBlockSums / kMergeLanes, channel_block = static_cast<int>(blockIdx.x) / blocks_of_sums;
  const int place = static_cast<int>(blockIdx.x) % blocks_of_sums * kMergeLanes + static_cast<int>(threadIdx.x);
  const float* partial = p.partial + int64_t{channel_block} * kBlockSums + place;
  const int64_t stride = int64_t{p.channel_blocks} * kBlockSums;
  float sum = 0.0f;
#pragma unroll 8
  for (int64_t share = threadIdx.y; share < p.shares; share += kMergeSplits) sum += partial[share * stride];
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0) return;
  for (int split = 1; split < kMergeSplits; ++split) sum += sums[split][threadIdx.x];

  // Whose sum it is: see warp_product for the rows and columns that a lane holds.
  const int thread = place % kConvThreads, own = place / kConvThreads, lane = thread % 32;
  const int group = own / (8 * kPairTiles), tile = own / 8 % kPairTiles, odd = own / 4 % 2;
  const int channel = channel_block * kConvChannels + 16 * group + own / 2 % 2 * 8 + lane / 4;
  const int pair = pair_of(thread / 32, tile, lane % 4 * 2 + own % 2);
  const int row = pair / (4 * p.eighths), value = pair % (4 * p.eighths) * 2 + odd - p.lead;
  if (channel >= p.channels_out || row >= p.window_rows || value < 0 || value >= p.values) return;
  static_cast<scalar_t*>(p.grad_weight)[(int64_t{channel} * p.window_rows + row) * p.values + value] = from_float<scalar_t>(sum);
}

Kernel kernel_of(const ConvRowsBackwardParams& c) {
  Kernel kernel{window_parts(c.x, c.window, kMostRows, kStagedBytes, kMostBlocks)};
  const int64_t count = kernel.parts.count();
  kernel.parts_of_all = count;
  kernel.shares = count < kMostBlocks ? count : kMostBlocks;
  kernel.channel_blocks = static_cast<int>(ceil_div(c.channels_out, kConvChannels));
  kernel.channels_out = c.channels_out;
  kernel.grad_y = c.grad_y;
  kernel.x = c.x_data;
  kernel.partial = c.partial;
  return kernel;
}

}  // namespace

int64_t conv_rows_partials(const ConvRowsBackwardParams& params) {
  const Kernel kernel = kernel_of(params);
  return kernel.shares * kernel.channel_blocks * kBlockSums;
}

cudaError_t launch_conv_rows_backward(const ConvRowsBackwardParams& params, cudaStream_t stream) {
  const Kernel kernel = kernel_of(params);
  const WindowParts& parts = kernel.parts;
  const int bytes = kRing * kTileBytes + parts.staged_bytes() + 4 * table_size(parts, kTilePixels);
  const cudaError_t status = with_window_traits(params.dtype, parts, [&](auto scalar, auto eighths, auto even) {
    const auto entry = conv_rows_backward_kernel<decltype(scalar), decltype(eighths)::value, decltype(even)::value>;
    return launch_with_memory(entry, kernel.shares * kernel.channel_blocks, kernel, bytes, stream);
  });
  if (status != cudaSuccess) return status;
  const Merge merge{kernel.shares,          kernel.channel_blocks, kernel.channels_out, parts.window.h.kernel, parts.values,
                    parts.lead, parts.eighths, kernel.partial,        params.grad_weight};
  const dim3 grid(static_cast<unsigned>(kernel.channel_blocks * (kBlockSums / kMergeLanes))), block(kMergeLanes, kMergeSplits);
  return params.dtype == DType::kFloat16 ? launch(conv_rows_merge_kernel<__half>, grid, block, merge, stream)
                                         : launch(conv_rows_merge_kernel<__nv_bfloat16>, grid, block, merge, stream);
}

}  // namespace fastres::cuda
