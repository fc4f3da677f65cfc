// Formula: y = act(conv(x, weight) + bias [+ residual]), stride 1, y of x's size, as products of matrices: output channels by
// places. The pixels of x with the zeros before each row and above each image, row after row, image after image, are a line of
// places; what follows a row or an image is what precedes the next. An output at place o is the sum over the taps of the
// weight's part times place o + shift, the same shift for all outputs: the operand of a tap is that of the first tap, moved.
// Layout: NHWC, pixels aligned to 16 bytes; a block walks tiles of 512 places x 64 output channels, channels first. Of its
// warpgroups one moves data: a slice of 64 channels of all places that the tile reads, once for all taps, and the weight of a
// tap at a time; two compute 256 places each, the second some taps behind the first, so that while one finishes its tile the
// other's products run.
// Bytes per output: residual and y once, x and weights once from memory; from L2 x 1 + reach / 512 times for each 64 output
// channels, weights once for each 512 places: a third of what tiles of pixels take, which read x for every tap.
// Products: places between rows and images are computed too and left out: with a 3x3 window, (1 + 1 / width)(1 + 1 / height).
// Accumulate type: float, the products' own order; bias and residual are added in float; one rounding, to y's type.
// Invariants: places beyond the edges are read as zeros and never written; a warp lays out its own 16 channels by itself.
#include "common/epilogue.h"
#include "cuda/conv_direct.h"
#include "cuda/device/sm90_wide.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

using namespace sm90;

constexpr int kGroup = 128, kGroups = 2;  // threads of a warpgroup; those that compute
constexpr int kGroupPlaces = 256, kPlaces = kGroups * kGroupPlaces;
constexpr int kChannelsOut = 64, kDepth = 64;             // of a tile; of a slice of x and of a tap's weight
constexpr int kMostRows = 640, kBoxes = 4;                // places of a slice, brought in so many boxes
constexpr int kSlices = 2, kTaps = 7;                     // of the rings
constexpr int kLead = 4;                                  // taps that the first warpgroup is ahead of the second
constexpr int kChunk = 32;                                // places that a warp lays out at a time
constexpr int kWarpChannels = 16, kVec = 8;               // of a warp; of a 16-byte access
constexpr int kTapBytes = kChannelsOut * kRowBytes;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch
static_assert(kLead < kLeastDirectTaps && kLead + 1 < kTaps);

struct Kernel {
  TileMap x, weight;
  Images images;
  Window window;
  int rows, columns;  // of places, of one image: those of x, and the padding before them
  int box;            // places
  int channels_out, tiles, columns_of_tiles;
  const float* bias;
  const void* residual;  // or null
  void* y;
  bool relu;
};

struct Shared {
  uint8_t x[kSlices][kMostRows * kRowBytes];  // these first: each is aligned to 1024 bytes
  uint8_t weight[kTaps][kTapBytes];
  uint8_t out[kGroups * 4][kChunk * kWarpChannels * 2];
  Barrier x_full[kSlices], x_empty[kSlices], weight_full[kTaps], weight_empty[kTaps];
  Barrier lead;  // the first warpgroup has begun its tile
};
static_assert(sizeof(Shared) <= 227 << 10);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// A place in a ring, and the parity of the phase of its barriers.
template <int kCount>
struct Slot {
  int index = 0, parity = 0;

  __device__ void next() {
    if (++index == kCount) index = 0, parity ^= 1;
  }
};

// The tiles of one block, one after the other.
struct Tile {
  const Kernel& p;
  int index, number = 0;

  __device__ explicit Tile(const Kernel& p) : p(p), index(static_cast<int>(blockIdx.x)) {}
  __device__ explicit operator bool() const { return index < p.tiles; }
  __device__ void next() { index += static_cast<int>(gridDim.x), ++number; }
  __device__ int place() const { return index / p.columns_of_tiles * kPlaces; }
  __device__ int channel() const { return index % p.columns_of_tiles * kChannelsOut; }
};

// One direction of the line: the pixel of an output at a place, or none.
struct Walk {
  const Kernel& p;
  int column, line, pixel_row;  // the place's, line of the image; pixel_row: of all images, without the padding

  __device__ Walk(const Kernel& p, int place) : p(p) {
    const int row = place / p.columns, image = row / p.rows;
    column = place - row * p.columns;
    line = row - image * p.rows;
    pixel_row = image * p.images.height + line;
  }
  __device__ int64_t pixel() const {
    const bool inside = column < p.images.width && line < p.images.height && pixel_row < p.images.count * p.images.height;
    return inside ? static_cast<int64_t>(pixel_row) * p.images.width + column : -1;
  }
  __device__ void advance(int places) {
    for (column += places; column >= p.columns; column -= p.columns) {
      ++line, ++pixel_row;
      if (line == p.rows) line = 0, pixel_row -= p.rows - p.images.height;
    }
  }
};

__device__ __forceinline__ void load_slice(const Kernel& p, uint8_t* to, Barrier& full, int channel, int place) {
  full.arrive_and_expect(kBoxes * p.box * kRowBytes);
  for (int i = 0; i < kBoxes; ++i, place += p.box, to += p.box * kRowBytes) {
    const int row = place / p.columns, image = row / p.rows;
    load_pixels(to, p.x, full, channel, place - row * p.columns - p.window.w.padding,
                row - image * p.rows - p.window.h.padding, image, 0, 0);
  }
}

__device__ __forceinline__ void load_operands(const Kernel& p, Shared& s) {
  const int taps = p.window.h.kernel * p.window.w.kernel;
  Slot<kSlices> slice;
  Slot<kTaps> stage;
  for (Tile tile(p); tile; tile.next()) {
    for (int channel = 0; channel < p.images.channels; channel += kDepth, slice.next()) {
      s.x_empty[slice.index].wait(slice.parity ^ 1);
      load_slice(p, s.x[slice.index], s.x_full[slice.index], channel, tile.place());
      for (int tap = 0; tap < taps; ++tap, stage.next()) {
        s.weight_empty[stage.index].wait(stage.parity ^ 1);
        s.weight_full[stage.index].arrive_and_expect(kTapBytes);
        load_tile(s.weight[stage.index], p.weight, s.weight_full[stage.index], channel, tap, tile.channel());
      }
    }
  }
}

// Adds the products of one slice; `step` counts the taps of the tile.
template <typename scalar_t>
__device__ __forceinline__ void multiply(const Kernel& p, Shared& s, const uint8_t* x, Slot<kTaps>& stage, int group, int lane,
                                         int& step, float (&acc)[128]) {
  const Span &h = p.window.h, &w = p.window.w;
  int before = -1;  // the place of the tap before, whose products may still be under way
  for (int down = 0; down < h.kernel; ++down) {
    for (int right = 0; right < w.kernel; ++right, ++step, stage.next()) {
      const uint8_t* places = x + (down * h.dilation * p.columns + right * w.dilation) * kRowBytes;
      s.weight_full[stage.index].wait(stage.parity);
      pin(acc);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        wide_product<scalar_t>(acc, operand(s.weight[stage.index] + 32 * k), operand(places + 32 * k), step + k);
      commit_products();
      if (before >= 0) {
        wait_for_products<1>();
        if (lane == 0) s.weight_empty[before].arrive();
      }
      before = stage.index;
      if (step == kLead && group == 0 && threadIdx.x == 0) s.lead.arrive();
    }
  }
  wait_for_products<0>();
  pin(acc);
  if (lane == 0) s.weight_empty[before].arrive();
}

// Of a chunk's places this lane loads and stores 16 bytes, half the warp's channels, at every 16th, from lane / 2 on.
struct Vectors {
  static constexpr int kCount = kChunk / 16;
  int64_t at[kCount];  // the elements' offset, negative for none
  uint4 residual[kCount];

  __device__ void next(const Kernel& p, Walk& walk, int channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, walk.advance(16)) {
      const int64_t pixel = walk.pixel();
      at[i] = pixel >= 0 && channel < p.channels_out ? pixel * p.channels_out + channel : -1;
      residual[i] = uint4{0, 0, 0, 0};
      if (p.residual != nullptr && at[i] >= 0) residual[i] = load_16_bytes(static_cast<const __half*>(p.residual) + at[i]);
    }
  }
};

// Where 8 channels of a place lie in a warp's chunk: rows of 32 bytes, halves changed every four, so that the eight rows of a
// matrix, and eight lanes' vectors, hit every bank once.
__device__ __forceinline__ uint8_t* spot(uint8_t* out, int place, int half) {
  return out + place * kWarpChannels * 2 + ((half ^ (place / 4 % 2)) * 16);
}

// Adds bias and residual, applies the ReLU, rounds, turns channels by places round and stores them.
template <typename scalar_t>
__device__ __forceinline__ void finish(const Kernel& p, uint8_t* out, int place, int channel, int lane, const float (&acc)[128]) {
  float bias[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = channel + lane / 4 + 8 * i;
    bias[i] = row < p.channels_out ? p.bias[row] : 0.0f;
  }
  const int half = lane % 2;
  Walk walk(p, place + lane / 2);
  Vectors now, ahead;
  ahead.next(p, walk, channel + half * kVec);
#pragma unroll
  for (int chunk = 0; chunk < kGroupPlaces / kChunk; ++chunk) {
    now = ahead;
    if (p.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < Vectors::kCount; ++i)
        *reinterpret_cast<uint4*>(spot(out, 16 * i + lane / 2, half)) = now.residual[i];
      sync_warp();
    }
    if (chunk + 1 < kGroupPlaces / kChunk) ahead.next(p, walk, channel + half * kVec);
#pragma unroll
    for (int pair = 0; pair < kChunk / 16; ++pair) {  // of 8 places each
      uint8_t* row = spot(out, 16 * pair + lane / 16 * 8 + lane % 8, lane / 8 % 2);
      uint32_t m[4] = {};
      if (p.residual != nullptr) load_transposed(m, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = chunk * (kChunk / 8) + 2 * pair + i / 2;
        Vec<scalar_t, 2> value;
        memcpy(static_cast<void*>(&value), m + i, 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float v = acc[4 * j + 2 * (i % 2) + k] + bias[i % 2];
          if (p.residual != nullptr) v += to_float(value.v[k]);
          value.v[k] = from_float<scalar_t>(p.relu ? gpu_relu(v) : v);
        }
        memcpy(m + i, static_cast<const void*>(&value), 4);
      }
      store_transposed(row, m);
    }
    sync_warp();
#pragma unroll
    for (int i = 0; i < Vectors::kCount; ++i)
      if (now.at[i] >= 0)
        *reinterpret_cast<uint4*>(static_cast<scalar_t*>(p.y) + now.at[i]) =
            *reinterpret_cast<const uint4*>(spot(out, 16 * i + lane / 2, half));
    sync_warp();
  }
}

template <typename scalar_t>
__device__ __forceinline__ void compute(const Kernel& p, Shared& s, int group) {
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  Slot<kSlices> slice;
  Slot<kTaps> stage;
  for (Tile tile(p); tile; tile.next()) {
    float acc[128];
    int step = 0;
    if (group == 1) s.lead.wait(tile.number % 2);
    for (int channel = 0; channel < p.images.channels; channel += kDepth, slice.next()) {
      s.x_full[slice.index].wait(slice.parity);
      multiply<scalar_t>(p, s, s.x[slice.index] + group * kGroupPlaces * kRowBytes, stage, group, lane, step, acc);
      if (lane == 0) s.x_empty[slice.index].arrive();
    }
    finish<scalar_t>(p, s.out[4 * group + warp], tile.place() + group * kGroupPlaces,
                     tile.channel() + warp * kWarpChannels, lane, acc);
  }
}

#endif

template <typename scalar_t>
__global__ void __launch_bounds__((kGroups + 1) * kGroup, 1) sm90_conv_direct_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  Shared& s = shared_memory<Shared>();
  const int group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlices; ++i) s.x_full[i].init(1), s.x_empty[i].init(4 * kGroups);
    for (int i = 0; i < kTaps; ++i) s.weight_full[i].init(1), s.weight_empty[i].init(4 * kGroups);
    s.lead.init(1);
    publish_barriers();
    prefetch(p.x), prefetch(p.weight);
  }
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_begin();

  if (group < kGroups) {
    take_registers<kConsumerRegisters>();
    compute<scalar_t>(p, s, group);
  } else {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x % kGroup == 0) load_operands(p, s);
  }
#endif
}

int multiprocessor_count() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 0;
}

// Places from the first tap of a window to its last.
int64_t reach(const Images& x, const Window& window) {
  const auto span = [](const Span& s) { return int64_t{s.kernel - 1} * s.dilation; };
  return span(window.h) * (x.width + window.w.padding) + span(window.w);
}

// Places of a box, whole periods of the swizzle.
int64_t box_of(const Images& x, const Window& window) {
  return ceil_div(ceil_div(kPlaces + reach(x, window), kBoxes), 8) * 8;
}

// A window of as many pixels as the line has places: what the TMA unit then walks is the line.
Span line_of(const Span& s) { return {s.padding + 1, 1, s.padding, 1}; }

template <typename scalar_t>
cudaError_t launch_typed(const Kernel& kernel, int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared);
  const auto entry = sm90_conv_direct_kernel<scalar_t>;
  const void* function = reinterpret_cast<const void*>(entry);
  const cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  return status != cudaSuccess ? status : launch_behind(entry, dim3(blocks), dim3((kGroups + 1) * kGroup), kernel, kBytes, stream);
}

}  // namespace

bool sm90_conv_direct_fits(const Images& x, const Window& window) { return kBoxes * box_of(x, window) <= kMostRows; }

cudaError_t launch_sm90_conv_direct(const ConvDirectParams& params, cudaStream_t stream) {
  const ConvDirectParams& c = params;
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return cudaErrorInvalidDevice;
  Kernel kernel{};
  kernel.images = c.x;
  kernel.window = c.window;
  kernel.rows = c.x.height + c.window.h.padding;
  kernel.columns = c.x.width + c.window.w.padding;
  kernel.box = static_cast<int>(box_of(c.x, c.window));
  kernel.channels_out = c.channels_out;
  kernel.bias = c.bias;
  kernel.residual = c.residual;
  kernel.y = c.y;
  kernel.relu = c.relu;
  const int64_t places = int64_t{c.x.count} * kernel.rows * kernel.columns;
  kernel.columns_of_tiles = static_cast<int>(ceil_div(c.channels_out, kChannelsOut));
  const int64_t tiles = ceil_div(places, kPlaces) * kernel.columns_of_tiles;
  if (places + kPlaces + kMostRows > INT32_MAX || tiles + multiprocessors > INT32_MAX) return cudaErrorInvalidValue;
  kernel.tiles = static_cast<int>(tiles);

  const Window line{line_of(c.window.h), line_of(c.window.w)};
  cudaError_t status = make_image_map(&kernel.x, c.dtype, c.x_data, c.x, line, kernel.box);
  const int taps = c.window.h.kernel * c.window.w.kernel;
  if (status == cudaSuccess)
    status = make_tile_map(&kernel.weight, c.dtype, c.weight, c.channels_out, taps, c.x.channels, kChannelsOut);
  if (status != cudaSuccess) return status;
  const int blocks = static_cast<int>(tiles < multiprocessors ? tiles : multiprocessors);
  return c.dtype == DType::kFloat16 ? launch_typed<__half>(kernel, blocks, stream)
                                    : launch_typed<__nv_bfloat16>(kernel, blocks, stream);
}

}  // namespace fastres::cuda
