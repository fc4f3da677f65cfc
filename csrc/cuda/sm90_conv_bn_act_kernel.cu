// Formula: y = act(conv(x, weight) + bias [+ residual]), an implicit product of matrices: pixels by output channels.
// Layout: NHWC, pixels aligned to 16 bytes; a block walks tiles of 128 pixels x 128 output channels, channels first; of its
// warpgroups one moves data (a thread fills the ring of operands, another brings residuals and takes outputs away), two
// compute alternate tiles: while one finishes its tile, the other's products run.
// Bytes per output: residual and y once; x and weight once from memory, from L2 for every further tile and tap.
// Accumulate type: float, the products' own order; bias and residual are added in float; one rounding, to y's type.
// Invariants: tiles of one block are computed, finished and stored in order; what lies beyond the edges is read as zeros
// and never written; residual and output of a tile share a buffer, each thread overwriting what it read.
#include "common/epilogue.h"
#include "cuda/conv_bn_act.h"
#include "cuda/device/sm90.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

using namespace sm90;

constexpr int kTileRows = 128, kTileColumns = 128, kDepth = 64;  // pixels, output channels, input channels of a stage
constexpr int kStages = 5;
constexpr int kGroup = 128;                                     // threads of a warpgroup
constexpr int kBoxBytes = 128 * kRowBytes;                      // 128 rows of 64 elements
constexpr int kTilesInFlight = 2;                               // one of each computing warpgroup
constexpr int kReleases = 4;                                    // warps that have to be done with a stage
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

struct Kernel {
  TileMap x, weight, residual, y;
  const float* bias;
  Window window;
  int out_height, out_width;
  int rows_of_tiles, columns_of_tiles, steps_of_tap, steps;  // steps: stages of a tile
  int channels_out;
  bool pointwise;  // output pixel i is input pixel i
  bool relu, with_residual;
};

struct Shared {
  uint8_t x[kStages][kBoxBytes];  // boxes first: each is aligned to 1024 bytes
  uint8_t weight[kStages][kBoxBytes];
  uint8_t out[kTilesInFlight][2][kBoxBytes];  // 128 rows of 64 channels, twice
  Barrier full[kStages], empty[kStages];      // operands are there, are no longer needed
  Barrier ready[kTilesInFlight], finished[kTilesInFlight];  // the buffer holds the residual, the output
  Barrier turn[kTilesInFlight];                             // the other warpgroup's products are under way
};
static_assert(sizeof(Shared) <= 227 << 10);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// The tiles of one block, one after the other.
struct Tiles {
  const Kernel& p;
  int count;

  __device__ explicit Tiles(const Kernel& p) : p(p) {
    count = (p.rows_of_tiles * p.columns_of_tiles - static_cast<int>(blockIdx.x + 1)) / static_cast<int>(gridDim.x) + 1;
  }
  __device__ int number(int tile) const { return static_cast<int>(blockIdx.x + tile * gridDim.x); }
  __device__ int row(int tile) const { return number(tile) / p.columns_of_tiles * kTileRows; }
  __device__ int column(int tile) const { return number(tile) % p.columns_of_tiles * kTileColumns; }
};

// The parity of a barrier's phase, of a ring of kSlots, at use number `use` of the ring.
template <int kSlots>
__device__ __forceinline__ int parity_of(int use) { return use / kSlots % 2; }

__device__ __forceinline__ void load_operands(const Kernel& p, Shared& s, const Tiles& tiles) {
  int use = 0;
  for (int tile = 0; tile < tiles.count; ++tile) {
    const int row = tiles.row(tile), line = row / p.out_width;  // the tile's first output pixel
    const int x = row % p.out_width * p.window.w.stride - p.window.w.padding;
    const int y = line % p.out_height * p.window.h.stride - p.window.h.padding, image = line / p.out_height;
    for (int step = 0; step < p.steps; ++step, ++use) {
      const int slot = use % kStages, tap = step / p.steps_of_tap, channel = step % p.steps_of_tap * kDepth;
      s.empty[slot].wait(parity_of<kStages>(use) ^ 1);
      s.full[slot].arrive_and_expect(2 * kBoxBytes);
      if (p.pointwise) {
        load_tile(s.x[slot], p.x, s.full[slot], channel, 0, row);
      } else {
        const int right = tap % p.window.w.kernel * p.window.w.dilation, down = tap / p.window.w.kernel * p.window.h.dilation;
        load_pixels(s.x[slot], p.x, s.full[slot], channel, x, y, image, right, down);
      }
      load_tile(s.weight[slot], p.weight, s.full[slot], channel, tap, tiles.column(tile));
    }
  }
}

// Makes the buffer ready for a tile's output: with its residual in it where there is one.
__device__ __forceinline__ void prepare(const Kernel& p, Shared& s, const Tiles& tiles, int tile) {
  if (tile >= tiles.count) return;
  const int buffer = tile % kTilesInFlight;
  if (!p.with_residual) {
    s.ready[buffer].arrive();
    return;
  }
  s.ready[buffer].arrive_and_expect(2 * kBoxBytes);
  for (int half = 0; half < 2; ++half)
    load_tile(s.out[buffer][half], p.residual, s.ready[buffer], tiles.column(tile) + half * kDepth, 0, tiles.row(tile));
}

__device__ __forceinline__ void move_outputs(const Kernel& p, Shared& s, const Tiles& tiles) {
  for (int tile = 0; tile < kTilesInFlight; ++tile) prepare(p, s, tiles, tile);
  for (int tile = 0; tile < tiles.count; ++tile) {
    const int buffer = tile % kTilesInFlight;
    s.finished[buffer].wait(parity_of<kTilesInFlight>(tile));
    for (int half = 0; half < 2; ++half)
      if (tiles.column(tile) + half * kDepth < p.channels_out)
        store_tile(p.y, s.out[buffer][half], tiles.column(tile) + half * kDepth, tiles.row(tile));
    wait_for_stores();
    prepare(p, s, tiles, tile + kTilesInFlight);
  }
}

template <typename scalar_t>
__device__ __forceinline__ void multiply(const Kernel& p, Shared& s, int tile, int lane, float (&acc)[2][64]) {
  int use = tile * p.steps;
  int before = -1;  // the slot of the step before, whose products may still be under way
  for (int step = 0; step < p.steps; ++step, ++use) {
    const int slot = use % kStages;
    s.full[slot].wait(parity_of<kStages>(use));
    pin(acc[0]);
    pin(acc[1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint64_t weight = operand(s.weight[slot] + 32 * k);
      product<scalar_t>(acc[0], operand(s.x[slot] + 32 * k), weight, step + k);
      product<scalar_t>(acc[1], operand(s.x[slot] + 64 * kRowBytes + 32 * k), weight, step + k);
    }
    commit_products();
    if (before >= 0) {
      wait_for_products<1>();
      if (lane == 0) s.empty[before].arrive();
    }
    before = slot;
  }
  if (threadIdx.x % kGroup == 0) s.turn[(tile + 1) % kTilesInFlight].arrive();
  wait_for_products<0>();
  pin(acc[0]);
  pin(acc[1]);
  if (lane == 0) s.empty[before].arrive();
}

// Adds bias and residual, applies the ReLU, rounds, and leaves the output where the residual was. Row r of a buffer is 128
// bytes, their 16-byte parts in the order of the swizzle, part ^ r % 8: the warp's 4-byte accesses hit every bank once.
template <typename scalar_t>
__device__ __forceinline__ void finish(const Kernel& p, uint8_t (&out)[2][kBoxBytes], int column, int warp, int lane,
                                       const float (&acc)[2][64]) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int channel = column + 8 * j + 2 * (lane % 4);
    const bool inside = channel < p.channels_out;
    const float bias[2] = {inside ? p.bias[channel] : 0.0f, inside ? p.bias[channel + 1] : 0.0f};
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      const int half = quarter / 2, i = quarter % 2, row = 64 * half + 16 * warp + lane / 4 + 8 * i;
      auto& pair = *reinterpret_cast<Vec<scalar_t, 2>*>(out[j / 8] + row * kRowBytes + ((j % 8) ^ (row % 8)) * 16 + lane % 4 * 4);
      Vec<scalar_t, 2> result = pair;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float v = acc[half][4 * j + 2 * i + k] + bias[k];
        if (p.with_residual) v += to_float(result.v[k]);
        result.v[k] = from_float<scalar_t>(p.relu ? gpu_relu(v) : v);
      }
      pair = result;
    }
  }
}

template <typename scalar_t>
__device__ __forceinline__ void compute(const Kernel& p, Shared& s, const Tiles& tiles, int group) {
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  for (int tile = group; tile < tiles.count; tile += kTilesInFlight) {
    const int parity = parity_of<kTilesInFlight>(tile);
    float acc[2][64];
    s.turn[group].wait(group == 0 ? parity ^ 1 : parity);  // the first tile's turn is given by nobody
    multiply<scalar_t>(p, s, tile, lane, acc);
    s.ready[group].wait(parity);
    finish<scalar_t>(p, s.out[group], tiles.column(tile), warp, lane, acc);
    publish_shared();
    s.finished[group].arrive();
  }
}

#endif

template <typename scalar_t>
__global__ void __launch_bounds__(3 * kGroup, 1) sm90_conv_act_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Shared& s = shared_memory<Shared>();
  const int group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) s.full[i].init(1), s.empty[i].init(kReleases);
    for (int i = 0; i < kTilesInFlight; ++i) s.ready[i].init(1), s.finished[i].init(kGroup), s.turn[i].init(1);
    publish_barriers();
    prefetch(p.x), prefetch(p.weight), prefetch(p.residual), prefetch(p.y);
  }
  __syncthreads();

  const Tiles tiles(p);
  if (group < kTilesInFlight) {
    take_registers<kConsumerRegisters>();
    compute<scalar_t>(p, s, tiles, group);
  } else {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x % kGroup == 0) load_operands(p, s, tiles);
    if (threadIdx.x % kGroup == 32) move_outputs(p, s, tiles);
  }
#endif
}

template <typename scalar_t>
cudaError_t launch_typed(const Kernel& kernel, int blocks, cudaStream_t stream) {
  const auto entry = sm90_conv_act_kernel<scalar_t>;
  const void* function = reinterpret_cast<const void*>(entry);
  const cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (status != cudaSuccess) return status;
  void* arguments[] = {const_cast<Kernel*>(&kernel)};
  return cudaLaunchKernel(entry, dim3(blocks), dim3(3 * kGroup), arguments, sizeof(Shared), stream);
}

}  // namespace

cudaError_t launch_sm90_conv_act(const ConvActParams& params, cudaStream_t stream) {
  const ConvActParams& c = params;
  const Span &h = c.window.h, &w = c.window.w;
  Kernel kernel{};
  kernel.bias = c.bias;
  kernel.window = c.window;
  kernel.out_height = h.out(c.x.height);
  kernel.out_width = w.out(c.x.width);
  kernel.channels_out = c.channels_out;
  kernel.pointwise = h.kernel * w.kernel == 1 && h.stride * w.stride == 1 && h.padding + w.padding == 0;
  kernel.relu = c.relu;
  kernel.with_residual = c.residual != nullptr;
  const int64_t pixels = int64_t{c.x.count} * kernel.out_height * kernel.out_width;
  const int64_t rows = ceil_div(pixels, kTileRows), columns = ceil_div(c.channels_out, kTileColumns);
  kernel.steps_of_tap = static_cast<int>(ceil_div(c.x.channels, kDepth));
  kernel.steps = h.kernel * w.kernel * kernel.steps_of_tap;
  if (pixels > INT32_MAX || rows * columns * kernel.steps > INT32_MAX) return cudaErrorInvalidValue;
  kernel.rows_of_tiles = static_cast<int>(rows);
  kernel.columns_of_tiles = static_cast<int>(columns);

  const auto tiled = [&](TileMap& map, const void* data, int64_t rows, int64_t taps, int64_t columns) {
    return make_tile_map(&map, c.dtype, data, rows, taps, columns, kTileRows);
  };
  cudaError_t status = kernel.pointwise ? tiled(kernel.x, c.x_data, pixels, 1, c.x.channels)
                                        : make_image_map(&kernel.x, c.dtype, c.x_data, c.x, c.window, kTileRows);
  static_assert(kTileRows == kTileColumns);
  if (status == cudaSuccess) status = tiled(kernel.weight, c.weight, c.channels_out, h.kernel * w.kernel, c.x.channels);
  const void* residual = kernel.with_residual ? c.residual : c.y;
  if (status == cudaSuccess) status = tiled(kernel.residual, residual, pixels, 1, c.channels_out);
  if (status == cudaSuccess) status = tiled(kernel.y, c.y, pixels, 1, c.channels_out);
  int device = 0, multiprocessors = 0;
  if (status == cudaSuccess) status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;

  const int blocks = static_cast<int>(rows * columns < multiprocessors ? rows * columns : multiprocessors);
  return c.dtype == DType::kFloat16 ? launch_typed<__half>(kernel, blocks, stream)
                                    : launch_typed<__nv_bfloat16>(kernel, blocks, stream);
}

}  // namespace fastres::cuda
