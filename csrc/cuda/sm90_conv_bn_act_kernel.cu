// Formula: y = act(conv(x, weight) + bias [+ residual] [+ conv1x1(shortcut)]), implicit products of matrices: pixels by
// output channels, the depth first that of x and its taps, then that of the shortcut.
// Layout: NHWC, pixels aligned to 16 bytes; a block walks tiles of kRows pixels x 128 output channels, channels first; of its
// warpgroups one moves data (a thread fills the ring of operands, another brings residuals and takes outputs away), two
// compute parts of 128 x 128: each a tile of its own in turns, so that while one finishes its tile the other's products run,
// or together the halves of a tile of 256 pixels, which takes a quarter less from L2 for each product.
// Bytes per output: residual and y once; x, shortcut and weights once from memory, from L2 for every further tile and tap.
// Accumulate type: float, the products' own order; bias and residual are added in float; one rounding, to y's type.
// Invariants: parts of one block are computed, finished and stored in order; what lies beyond the edges is read as zeros
// and never written; residual and output of a part share a buffer, each thread overwriting what it read. The thread that
// fills the ring divides nothing inside a tile: it has about 500 cycles for a stage. Where there are few tiles, several blocks
// share the depth of each: they leave sums in a workspace, which a second kernel adds in their order.
#include <algorithm>

#include "common/epilogue.h"
#include "cuda/conv_bn_act.h"
#include "cuda/device/sm90.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

using namespace sm90;

constexpr int kPartRows = 128, kTileColumns = 128, kDepth = 64;  // pixels, output channels, input channels of a stage
constexpr int kGroup = 128;                                      // threads of a warpgroup
constexpr int kGroups = 2;                                       // that compute, a part each
constexpr int kBoxBytes = 128 * kRowBytes;                       // 128 rows of 64 elements
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

// kTogether: both warpgroups compute one tile.
template <bool kTogether>
struct Plan {
  static constexpr int kParts = kTogether ? kGroups : 1;  // of a tile
  static constexpr int kRows = kParts * kPartRows;
  static constexpr int kStages = kTogether ? 3 : 5;
  static constexpr int kReleases = 4 * kParts;  // warps that have to be done with a stage
  static constexpr int kStageBytes = (kParts + 1) * kBoxBytes;
};

// One of the products: its operands, and the steps along its depth.
struct Product {
  TileMap x, weight;
  Window window;
  int channels, steps;
  bool pointwise;  // output pixel i is input pixel i
};

struct Kernel {
  Product main, shortcut;
  TileMap residual, y;
  const float *bias, *shortcut_bias;
  int out_height, out_width;
  int tiles, columns_of_tiles, steps;  // steps: stages of a tile
  int row_step, column_step;           // from a block's tile to its next one, in tiles
  int pixels, channels_out;
  int splits;                          // blocks that share a tile, which then is their only one
  float* partial;                      // their sums, [splits, pixels, channels_out]; null where there is one
  bool relu, with_residual, with_shortcut;
};

constexpr int kLeastTogether = 16;  // steps of a tile: with 9 (3x3 of 64 channels) ends of tiles took a third of the time on an H200
constexpr int kLeastShare = 4;  // steps of a block that shares a tile: fewer are not worth their sums
constexpr int kMergeVec = 8;  // channels in and out are multiples of it

struct Merge {
  const float* partial;  // [splits, numel]
  int splits;
  int64_t numel;
  int channels;
  bool relu;
  const float *bias, *shortcut_bias;
  const void* residual;  // or null
  void* y;
};

template <bool kTogether>
struct Shared {
  static constexpr int kStages = Plan<kTogether>::kStages;
  uint8_t x[kStages][Plan<kTogether>::kParts][kBoxBytes];  // boxes first: each is aligned to 1024 bytes
  uint8_t weight[kStages][kBoxBytes];
  uint8_t out[kGroups][2][kBoxBytes];                 // of a part: 128 rows of 64 channels, twice
  Barrier full[kStages], empty[kStages];              // operands are there, are no longer needed
  Barrier ready[kGroups], finished[kGroups];          // the buffer holds the residual, the output
  Barrier turn[kGroups];                              // the other warpgroup's products are under way
};
static_assert(sizeof(Shared<false>) <= 227 << 10 && sizeof(Shared<true>) <= 227 << 10);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// The tiles of one block, one after the other.
struct Tiles {
  const Kernel& p;
  int left, row, column;  // in tiles

  __device__ explicit Tiles(const Kernel& p) : p(p) {
    const int block = static_cast<int>(blockIdx.x) / p.splits, blocks = static_cast<int>(gridDim.x) / p.splits;
    left = (p.tiles - block - 1) / blocks + 1;
    row = block / p.columns_of_tiles;
    column = block % p.columns_of_tiles;
  }
  __device__ void next() {
    --left;
    row += p.row_step;
    column += p.column_step;
    if (column >= p.columns_of_tiles) column -= p.columns_of_tiles, ++row;
  }
};

// Their parts; part i is computed by warpgroup i % kGroups, in the buffer of this number.
template <bool kTogether>
struct Parts {
  Tiles tiles;
  int number = 0;

  __device__ explicit Parts(const Kernel& p) : tiles(p) {}
  __device__ explicit operator bool() const { return tiles.left > 0; }
  __device__ int tile() const { return number / Plan<kTogether>::kParts; }
  __device__ int group() const { return number % kGroups; }
  __device__ int parity() const { return number / kGroups % 2; }  // of the phase of its buffer's barriers
  __device__ int row() const {
    return tiles.row * Plan<kTogether>::kRows + number % Plan<kTogether>::kParts * kPartRows;
  }
  __device__ int column() const { return tiles.column * kTileColumns; }
  __device__ void next() {
    if (++number % Plan<kTogether>::kParts == 0) tiles.next();
  }
};

// This block's share of the steps of a tile.
struct Share {
  int first, last;

  __device__ explicit Share(const Kernel& p) {
    const int split = static_cast<int>(blockIdx.x) % p.splits;
    first = p.steps * split / p.splits;
    last = p.steps * (split + 1) / p.splits;
  }
};

// The place of a stage in the ring, and the parity of the phase of its barriers.
template <int kStages>
struct Slot {
  int index, parity;

  __device__ explicit Slot(int stage) : index(stage % kStages), parity(stage / kStages % 2) {}
  __device__ void next() {
    if (++index == kStages) index = 0, parity ^= 1;
  }
};

// Fills the ring with the operands of one product for one tile, from a step on to another.
template <bool kTogether, typename Ring>
__device__ __forceinline__ void load_product(const Kernel& p, const Product& product, Shared<kTogether>& s, Ring& slot, int row,
                                             int column, int step, int last) {
  const Span &h = product.window.h, &w = product.window.w;
  int x = 0, y = 0, image = 0;  // of the tile's first output pixel
  if (!product.pointwise) {
    const int line = row / p.out_width;
    x = (row - line * p.out_width) * w.stride - w.padding;
    image = line / p.out_height;
    y = (line - image * p.out_height) * h.stride - h.padding;
  }
  int channel = 0, tap = 0, in_row = 0, right = 0, down = 0;  // of the step; in_row: the tap's place in its row
  if (step > 0) {
    const int of_tap = (product.channels + kDepth - 1) / kDepth;
    tap = step / of_tap;
    channel = (step - tap * of_tap) * kDepth;
    const int row_of_taps = tap / w.kernel;
    in_row = tap - row_of_taps * w.kernel;
    right = in_row * w.dilation;
    down = row_of_taps * h.dilation;
  }
  for (; step < last; ++step, slot.next()) {
    Barrier& full = s.full[slot.index];
    s.empty[slot.index].wait(slot.parity ^ 1);
    full.arrive_and_expect(Plan<kTogether>::kStageBytes);
    if (product.pointwise) load_tile(s.x[slot.index], product.x, full, channel, 0, row);
    else load_pixels(s.x[slot.index], product.x, full, channel, x, y, image, right, down);
    load_tile(s.weight[slot.index], product.weight, full, channel, tap, column);
    channel += kDepth;
    if (channel < product.channels) continue;
    channel = 0, ++tap, ++in_row, right += w.dilation;
    if (in_row == w.kernel) in_row = 0, right = 0, down += h.dilation;
  }
}

template <bool kTogether>
__device__ __forceinline__ void load_operands(const Kernel& p, Shared<kTogether>& s) {
  const Share share(p);
  const int main = p.main.steps;
  Slot<Plan<kTogether>::kStages> slot(0);
  for (Tiles tiles(p); tiles.left > 0; tiles.next()) {
    const int row = tiles.row * Plan<kTogether>::kRows, column = tiles.column * kTileColumns;
    load_product<kTogether>(p, p.main, s, slot, row, column, share.first, share.last < main ? share.last : main);
    if (share.last > main)
      load_product<kTogether>(p, p.shortcut, s, slot, row, column, share.first > main ? share.first - main : 0,
                              share.last - main);
  }
}

// Makes the buffer ready for a part's output: with its residual in it where there is one.
template <bool kTogether>
__device__ __forceinline__ void prepare(const Kernel& p, Shared<kTogether>& s, Parts<kTogether>& part) {
  if (!part) return;
  Barrier& ready = s.ready[part.group()];
  if (p.with_residual) {
    ready.arrive_and_expect(2 * kBoxBytes);
    for (int half = 0; half < 2; ++half)
      load_tile(s.out[part.group()][half], p.residual, ready, part.column() + half * kDepth, 0, part.row());
  } else {
    ready.arrive();
  }
  part.next();
}

template <bool kTogether>
__device__ __forceinline__ void move_outputs(const Kernel& p, Shared<kTogether>& s) {
  if (p.partial != nullptr) return;
  Parts<kTogether> ahead(p);
  for (int i = 0; i < kGroups; ++i) prepare(p, s, ahead);
  for (Parts<kTogether> part(p); part; part.next()) {
    s.finished[part.group()].wait(part.parity());
    for (int half = 0; half < 2; ++half)
      if (part.column() + half * kDepth < p.channels_out)
        store_tile(p.y, s.out[part.group()][half], part.column() + half * kDepth, part.row());
    wait_for_stores();
    prepare(p, s, ahead);
  }
}

template <bool kTogether, typename scalar_t>
__device__ __forceinline__ void multiply(const Kernel& p, Shared<kTogether>& s, int tile, int group, int lane,
                                         float (&acc)[2][64]) {
  const Share share(p);
  const int steps = share.last - share.first;
  Slot<Plan<kTogether>::kStages> slot(tile * steps);
  int before = -1;  // the place of the stage before, whose products may still be under way
  for (int step = 0; step < steps; ++step, slot.next()) {
    const uint8_t* x = s.x[slot.index][kTogether ? group : 0];
    s.full[slot.index].wait(slot.parity);
    pin(acc[0]);
    pin(acc[1]);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint64_t weight = operand(s.weight[slot.index] + 32 * k);
      product<scalar_t>(acc[0], operand(x + 32 * k), weight, step + k);
      product<scalar_t>(acc[1], operand(x + 64 * kRowBytes + 32 * k), weight, step + k);
    }
    commit_products();
    if (before >= 0) {
      wait_for_products<1>();
      if (lane == 0) s.empty[before].arrive();
    }
    before = slot.index;
  }
  if (!kTogether && threadIdx.x % kGroup == 0) s.turn[1 - group].arrive();
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
    float bias[2] = {inside ? p.bias[channel] : 0.0f, inside ? p.bias[channel + 1] : 0.0f};
    if (p.with_shortcut && inside) bias[0] += p.shortcut_bias[channel], bias[1] += p.shortcut_bias[channel + 1];
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

// Leaves a part's sums in the workspace.
__device__ __forceinline__ void write_partial(const Kernel& p, int row, int column, int warp, int lane,
                                              const float (&acc)[2][64]) {
  const int64_t split = static_cast<int>(blockIdx.x) % p.splits;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int half = quarter / 2, i = quarter % 2, pixel = row + 64 * half + 16 * warp + lane / 4 + 8 * i;
    if (pixel >= p.pixels) continue;
    float* out = p.partial + (split * p.pixels + pixel) * p.channels_out + column + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 pair{acc[half][4 * j + 2 * i], acc[half][4 * j + 2 * i + 1]};
      if (column + 8 * j < p.channels_out) *reinterpret_cast<float2*>(out + 8 * j) = pair;
    }
  }
}

template <bool kTogether, typename scalar_t>
__device__ __forceinline__ void compute(const Kernel& p, Shared<kTogether>& s, int group) {
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  Parts<kTogether> part(p);
  for (int i = 0; i < group; ++i) part.next();
  while (part) {
    float acc[2][64];
    if (!kTogether) s.turn[group].wait(group == 0 ? part.parity() ^ 1 : part.parity());  // nobody gives the first one its turn
    multiply<kTogether, scalar_t>(p, s, part.tile(), group, lane, acc);
    if (p.partial != nullptr) {
      write_partial(p, part.row(), part.column(), warp, lane, acc);
      return;
    }
    s.ready[group].wait(part.parity());
    finish<scalar_t>(p, s.out[group], part.column(), warp, lane, acc);
    publish_shared();
    s.finished[group].arrive();
    for (int i = 0; i < kGroups; ++i) part.next();
  }
}

#endif

template <bool kTogether, typename scalar_t>
__global__ void __launch_bounds__(3 * kGroup, 1) sm90_conv_act_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Shared<kTogether>& s = shared_memory<Shared<kTogether>>();
  const int group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Plan<kTogether>::kStages; ++i) s.full[i].init(1), s.empty[i].init(Plan<kTogether>::kReleases);
    for (int i = 0; i < kGroups; ++i) s.ready[i].init(1), s.finished[i].init(kGroup), s.turn[i].init(1);
    publish_barriers();
    prefetch(p.main.x), prefetch(p.main.weight), prefetch(p.residual), prefetch(p.y);
  }
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_begin();

  if (group < kGroups) {
    take_registers<kConsumerRegisters>();
    compute<kTogether, scalar_t>(p, s, group);
  } else {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x % kGroup == 0) load_operands<kTogether>(p, s);
    if (threadIdx.x % kGroup == 32) move_outputs<kTogether>(p, s);
  }
#endif
}

// Adds the sums of the blocks that shared a tile, in their order, and does what is left; a thread owns a vector of channels.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) sm90_conv_merge_kernel(const __grid_constant__ Merge p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int64_t offset = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kMergeVec;
  if (offset >= p.numel) return;
  const int channel = static_cast<int>(offset % p.channels);
  float sum[kMergeVec] = {};
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) {
    const float* partial = p.partial + split * p.numel + offset;
    const Vec<float, kMergeVec> in = load<kMergeVec>(partial);
#pragma unroll
    for (int j = 0; j < kMergeVec; ++j) sum[j] += in.v[j];
  }
  Vec<scalar_t, kMergeVec> residual{};
  if (p.residual != nullptr) residual = load<kMergeVec>(static_cast<const scalar_t*>(p.residual) + offset);
#pragma unroll
  for (int j = 0; j < kMergeVec; ++j) {
    sum[j] += p.shortcut_bias != nullptr ? p.bias[channel + j] + p.shortcut_bias[channel + j] : p.bias[channel + j];
    if (p.residual != nullptr) sum[j] += to_float(residual.v[j]);
    if (p.relu) sum[j] = relu(sum[j]);
  }
  store(static_cast<scalar_t*>(p.y) + offset, sum);
#endif
}

template <bool kTogether, typename scalar_t>
cudaError_t launch_typed(const ConvActParams& c, const Kernel& kernel, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kTogether>);
  const auto entry = sm90_conv_act_kernel<kTogether, scalar_t>;
  const void* function = reinterpret_cast<const void*>(entry);
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status == cudaSuccess) status = launch_behind(entry, dim3(blocks), dim3(3 * kGroup), kernel, kBytes, stream);
  if (status != cudaSuccess || kernel.partial == nullptr) return status;
  const int64_t numel = int64_t{kernel.pixels} * kernel.channels_out;
  const Merge merge{kernel.partial, kernel.splits, numel, kernel.channels_out, c.relu,
                    c.bias,         c.shortcut_bias, c.residual, c.y};
  const dim3 grid(static_cast<unsigned>(ceil_div(numel, kThreads * kMergeVec)));
  return launch_behind(sm90_conv_merge_kernel<scalar_t>, grid, dim3(kThreads), merge, 0, stream);
}

template <bool kTogether>
cudaError_t launch_plan(const ConvActParams& c, Kernel& kernel, int64_t pixels, int multiprocessors, cudaStream_t stream) {
  constexpr int kRows = Plan<kTogether>::kRows;
  const int64_t tiles = ceil_div(pixels, kRows) * kernel.columns_of_tiles;
  if (pixels > INT32_MAX || tiles * kernel.steps > INT32_MAX) return cudaErrorInvalidValue;
  const int walks = static_cast<int>(tiles < multiprocessors ? tiles : multiprocessors), blocks = walks * kernel.splits;
  kernel.tiles = static_cast<int>(tiles);
  kernel.row_step = walks / kernel.columns_of_tiles;
  kernel.column_step = walks % kernel.columns_of_tiles;

  const auto tiled = [&](TileMap& map, const void* data, int64_t rows, int64_t taps, int64_t columns, int box_rows) {
    return make_tile_map(&map, c.dtype, data, rows, taps, columns, box_rows);
  };
  const auto operands = [&](Product& product, const Images& x, const void* data, const void* weight) {
    const Window& window = product.window;
    const cudaError_t status = product.pointwise ? tiled(product.x, data, pixels, 1, x.channels, kRows)
                                                 : make_image_map(&product.x, c.dtype, data, x, window, kRows);
    if (status != cudaSuccess) return status;
    return tiled(product.weight, weight, c.channels_out, window.h.kernel * window.w.kernel, x.channels, kTileColumns);
  };
  cudaError_t status = operands(kernel.main, c.x, c.x_data, c.weight);
  if (status == cudaSuccess && kernel.with_shortcut)
    status = operands(kernel.shortcut, c.shortcut, c.shortcut_data, c.shortcut_weight);
  const void* residual = kernel.with_residual ? c.residual : c.y;
  if (status == cudaSuccess) status = tiled(kernel.residual, residual, pixels, 1, c.channels_out, kPartRows);
  if (status == cudaSuccess) status = tiled(kernel.y, c.y, pixels, 1, c.channels_out, kPartRows);
  if (status != cudaSuccess) return status;
  return c.dtype == DType::kFloat16 ? launch_typed<kTogether, __half>(c, kernel, blocks, stream)
                                    : launch_typed<kTogether, __nv_bfloat16>(c, kernel, blocks, stream);
}

Product describe(const Images& x, const Window& window) {
  const Span &h = window.h, &w = window.w;
  Product product{};
  product.window = window;
  product.channels = x.channels;
  product.steps = static_cast<int>(h.kernel * w.kernel * ceil_div(x.channels, kDepth));
  product.pointwise = h.kernel * w.kernel == 1 && h.stride * w.stride == 1 && h.padding + w.padding == 0;
  return product;
}

int multiprocessor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

// Without what it points to: sizes, steps, tiles.
Kernel plan(const ConvActParams& c) {
  Kernel kernel{};
  kernel.out_height = c.window.h.out(c.x.height);
  kernel.out_width = c.window.w.out(c.x.width);
  kernel.channels_out = c.channels_out;
  kernel.with_shortcut = c.shortcut_data != nullptr;
  kernel.main = describe(c.x, c.window);
  kernel.steps = kernel.main.steps;
  if (kernel.with_shortcut) {
    kernel.shortcut = describe(c.shortcut, c.shortcut_window);
    kernel.steps += kernel.shortcut.steps;
  }
  kernel.columns_of_tiles = static_cast<int>(ceil_div(c.channels_out, kTileColumns));
  return kernel;
}

int64_t pixels_of(const ConvActParams& c, const Kernel& kernel) {
  return int64_t{c.x.count} * kernel.out_height * kernel.out_width;
}

// A tile of 256 pixels takes as long as 1.5 of 128, whose stages wait for L2; with few stages the end of a tile weighs more,
// which only tiles in turns hide.
bool together_is_faster(int64_t pixels, int64_t columns, int steps, int multiprocessors) {
  const auto waves = [&](int rows) { return ceil_div(ceil_div(pixels, rows) * columns, multiprocessors); };
  return steps >= kLeastTogether && 3 * waves(2 * kPartRows) <= 2 * waves(kPartRows);
}

}  // namespace

int sm90_conv_splits(const ConvActParams& params) {
  const Kernel kernel = plan(params);
  const int64_t tiles = ceil_div(pixels_of(params, kernel), kPartRows) * kernel.columns_of_tiles;
  const int64_t splits = std::min<int64_t>(multiprocessor_count() / std::max<int64_t>(tiles, 1), kernel.steps / kLeastShare);
  return static_cast<int>(std::max<int64_t>(splits, 1));
}

cudaError_t launch_sm90_conv_act(const ConvActParams& params, cudaStream_t stream) {
  const ConvActParams& c = params;
  Kernel kernel = plan(c);
  const int64_t pixels = pixels_of(c, kernel);
  kernel.pixels = static_cast<int>(pixels);
  kernel.bias = c.bias;
  kernel.shortcut_bias = c.shortcut_bias;
  kernel.relu = c.relu;
  kernel.with_residual = c.residual != nullptr;
  kernel.partial = c.partial;
  kernel.splits = c.partial == nullptr ? 1 : c.splits;
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return cudaErrorInvalidDevice;
  return c.partial == nullptr && together_is_faster(pixels, kernel.columns_of_tiles, kernel.steps, multiprocessors)
             ? launch_plan<true>(c, kernel, pixels, multiprocessors, stream)
             : launch_plan<false>(c, kernel, pixels, multiprocessors, stream);
}

}  // namespace fastres::cuda
