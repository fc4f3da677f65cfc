// Formula: y = act(conv(x, weight) + bias [+ residual]), as products of matrices: output channels by places. Or, for the batch
// norm behind it in training, y = conv(x, weight), and of each channel the statistics of every 256 places.
// A place is where a window may lie, row after row, image after image: a line. Two ways to find what lies under a tap:
//   by tap: places are output pixels; the TMA unit reads x under one tap of them at a time;
//   whole (stride 1, y of x's size): places are the pixels of x with the zeros before each row and above each image; what
//   follows a row or an image is what precedes the next. x is read once, with what the last windows reach beyond: the operand
//   of a tap is that of the first one, moved by the same number of places for all outputs.
// Layout: NHWC, pixels aligned to 16 bytes; a tile is of 512 places x 64 output channels; the blocks of a cluster take tiles
// of the same places, share the slices of x, 64 channels each, and walk on together. Of a block's warpgroups one moves data, a
// slice and the weights of its taps at a time; two compute 256 places each, the second some taps behind the first, so that
// while one finishes its tile the other's products run.
// Bytes per output: residual and y once, x and weights once from memory. From L2, for each tap of a slice (1,024 cycles of
// products): 8 KiB of weights, and of x 64 KiB by tap, whole so much for all taps, divided by the blocks of a cluster. An H200
// gives a multiprocessor about 24 bytes a cycle.
// Products: whole, places of zeros are computed too and left out: with a 3x3 window, (1 + 1 / width)(1 + 1 / height).
// Accumulate type: float, the products' own order; bias and residual are added in float; one rounding, to y's type. Statistics
// are of the rounded values, in two passes over registers: the mean, then deviations from it.
// Invariants: places beyond the edges are read as zeros, never written and in no statistics; a warp lays out its own 16 channels
// by itself; no block ends while another of its cluster may write to its memory.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/epilogue.h"
#include "cuda/conv_wide.h"
#include "cuda/device/ring.cuh"
#include "cuda/device/sm90_wide.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

using namespace sm90;

constexpr int kGroup = 128, kGroups = 2;  // threads of a warpgroup; those that compute
constexpr int kBlockThreads = (kGroups + 1) * kGroup;
constexpr int kGroupPlaces = 256, kPlaces = kGroups * kGroupPlaces;
constexpr int kChannelsOut = 64, kDepth = 64;    // of a tile; of a slice of x and of a tap's weight
constexpr int kMostCluster = 4;                  // blocks
constexpr int kMostBoxes = 4;                    // that bring a slice: a multiple of the cluster
constexpr int kChunk = 32;                       // places that a warp lays out at a time
constexpr int kWarpChannels = 16, kVec = 8;      // of a warp; of a 16-byte access
constexpr int kTapBytes = kChannelsOut * kRowBytes;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

template <bool kWhole>
struct Plan {
  static constexpr int kRows = kWhole ? 640 : kPlaces;  // of a slice in shared memory, at most
  static constexpr int kSlices = kWhole ? 2 : 3, kTaps = kWhole ? 7 : 3;  // of the rings
  static constexpr int kLead = kWhole ? 4 : 1;  // taps that the first warpgroup is ahead of the second
};
constexpr int kLeastWholeTaps = 5;  // of a window
static_assert(Plan<true>::kLead < kLeastWholeTaps);

struct Kernel {
  TileMap x, weight;
  Window window;
  int taps, channels, channels_out;
  int rows, columns;       // of places, of one image
  Images out;
  int boxes, box;          // of a slice; places of each
  int cluster, clusters;   // blocks; how many
  int share;               // boxes that a block loads for its cluster
  int tiles, columns_of_tiles;  // of clusters
  int lead;                // see Plan; negative where tiles are too short for it
  const float* bias;
  const void* residual;    // or null
  void* y;
  bool relu;
  float* moments;  // statistics: mean and sum of squared deviations, [parts, 2, channels_out]
  float* counts;   // and of how many values, [parts]
};

template <bool kWhole>
struct Shared {
  using P = Plan<kWhole>;
  uint8_t x[P::kSlices][P::kRows * kRowBytes];  // these first: each is aligned to 1024 bytes
  uint8_t weight[P::kTaps][kTapBytes];
  uint8_t out[kGroups * 4][kChunk * kWarpChannels * 2];
  int4 corners[kMostBoxes];  // of the boxes: x, y, image of the first place's window
  Barrier x_full[P::kSlices], x_empty[P::kSlices], weight_full[P::kTaps], weight_empty[P::kTaps];
  Barrier lead;  // the first warpgroup has begun its tile
};
static_assert(sizeof(Shared<true>) <= 227 << 10 && sizeof(Shared<false>) <= 227 << 10);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)

// The tiles of one block, one after the other.
struct Tile {
  const Kernel& p;
  int index, rank, number = 0;

  __device__ explicit Tile(const Kernel& p)
      : p(p), index(static_cast<int>(blockIdx.x) / p.cluster), rank(rank_in_cluster()) {}
  __device__ explicit operator bool() const { return index < p.tiles; }
  __device__ void next() { index += p.clusters, ++number; }
  __device__ int place() const { return index / p.columns_of_tiles * kPlaces; }
  __device__ int channel() const { return (index % p.columns_of_tiles * p.cluster + rank) * kChannelsOut; }
};

// The output pixel at a place, or none.
struct Walk {
  const Kernel& p;
  int column, line, pixel_row;  // the place's, line of the image; pixel_row: of all images, without the zeros

  __device__ Walk(const Kernel& p, int place) : p(p) {
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

// Of the boxes that this block loads.
template <bool kWhole>
__device__ __forceinline__ void find_corners(const Kernel& p, Shared<kWhole>& s, int place) {
  for (int i = 0; i < p.share; ++i, place += p.box) {
    const int row = place / p.columns, image = row / p.rows;
    s.corners[i] = make_int4((place - row * p.columns) * p.window.w.stride - p.window.w.padding,
                             (row - image * p.rows) * p.window.h.stride - p.window.h.padding, image, 0);
  }
}

template <bool kWhole>
__device__ __forceinline__ void load_operands(const Kernel& p, Shared<kWhole>& s) {
  using P = Plan<kWhole>;
  const int apart = kWhole ? 1 : p.taps, together = kWhole ? p.taps : 1;  // taps with slices of their own, of a slice
  const int first = rank_in_cluster() * p.share * p.box;  // of this block's places in a slice
  Slot<P::kSlices> slice;
  Slot<P::kTaps> stage;
  for (Tile tile(p); tile; tile.next()) {
    find_corners(p, s, tile.place() + first);
    for (int tap = 0; tap < apart; ++tap) {
      const int row = tap / p.window.w.kernel;
      const int down = row * p.window.h.dilation, right = (tap - row * p.window.w.kernel) * p.window.w.dilation;
      for (int channel = 0; channel < p.channels; channel += kDepth, slice.next()) {
        Barrier& full = s.x_full[slice.index];
        s.x_empty[slice.index].wait(slice.parity ^ 1);
        full.arrive_and_expect(p.boxes * p.box * kRowBytes);
        uint8_t* to = s.x[slice.index] + first * kRowBytes;
        for (int i = 0; i < p.share; ++i, to += p.box * kRowBytes) {
          const int4 at = s.corners[i];
          load_pixels_everywhere(to, p.x, full, channel, at.x, at.y, at.z, right, down, p.cluster);
        }
        for (int i = 0; i < together; ++i, stage.next()) {
          s.weight_empty[stage.index].wait(stage.parity ^ 1);
          s.weight_full[stage.index].arrive_and_expect(kTapBytes);
          load_tile(s.weight[stage.index], p.weight, s.weight_full[stage.index], channel, tap + i, tile.channel());
        }
      }
    }
  }
}

// The places in the rings of what products under way read: a tap's weights, and the slice behind whose last tap they are.
struct Held {
  int stage = -1, slice = -1;
};

template <bool kWhole>
__device__ __forceinline__ void give_back(const Kernel& p, Shared<kWhole>& s, const Held& held, int lane) {
  if (held.stage >= 0 && lane == 0) s.weight_empty[held.stage].arrive();
  if (held.slice >= 0 && lane < p.cluster) arrive_at(s.x_empty[held.slice], lane);
}

// Adds the products of the taps of one slice; `step` counts the taps of the tile. The last ones are left under way.
template <bool kWhole, typename scalar_t>
__device__ __forceinline__ void multiply(const Kernel& p, Shared<kWhole>& s, const uint8_t* x, int slice,
                                         Slot<Plan<kWhole>::kTaps>& stage, Held& held, int group, int lane, int& step,
                                         float (&acc)[128]) {
  const Span &h = p.window.h, &w = p.window.w;
  for (int down = 0; down < (kWhole ? h.kernel : 1); ++down) {
    for (int right = 0; right < (kWhole ? w.kernel : 1); ++right, ++step, stage.next()) {
      const uint8_t* places = kWhole ? x + (down * h.dilation * p.columns + right * w.dilation) * kRowBytes : x;
      s.weight_full[stage.index].wait(stage.parity);
      pin(acc);
      begin_products();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        wide_product<scalar_t>(acc, operand(s.weight[stage.index] + 32 * k), operand(places + 32 * k), step + k);
      commit_products();
      wait_for_products<1>();
      give_back(p, s, held, lane);
      held = {stage.index, -1};
      if (step == p.lead && group == 0 && threadIdx.x == 0) s.lead.arrive();
    }
  }
  held.slice = slice;
}

// Of a chunk's places this lane loads and stores 16 bytes, half the warp's channels, at every 16th, from lane / 2 on.
struct Vectors {
  static constexpr int kCount = kChunk / 16;
  int pixel[kCount];  // negative for none
  uint4 residual[kCount];

  __device__ void next(const Kernel& p, bool adds, Walk& walk, int channel) {
#pragma unroll
    for (int i = 0; i < kCount; ++i, walk.advance(16)) {
      pixel[i] = channel < p.channels_out ? walk.pixel() : -1;
      residual[i] = uint4{0, 0, 0, 0};
      if (adds && pixel[i] >= 0)
        residual[i] = load_16_bytes(static_cast<const __half*>(p.residual) + offset(p, i, channel));
    }
  }
  __device__ int64_t offset(const Kernel& p, int i, int channel) const {
    return static_cast<int64_t>(pixel[i]) * p.channels_out + channel;
  }
};

// Where 8 channels of a place lie in a warp's chunk: rows of 32 bytes, halves changed every four, so that the eight rows of a
// matrix, and eight lanes' vectors, hit every bank once.
__device__ __forceinline__ uint8_t* spot(uint8_t* out, int place, int half) {
  return out + place * kWarpChannels * 2 + ((half ^ (place / 4 % 2)) * 16);
}

// Adds bias and residual and applies the ReLU, if it is not kPlain; rounds, turns channels by places round and stores them.
template <bool kPlain, typename scalar_t>
__device__ __forceinline__ void finish(const Kernel& p, uint8_t* out, int place, int channel, int lane, const float (&acc)[128]) {
  float bias[2] = {};
  if constexpr (!kPlain) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = channel + lane / 4 + 8 * i;
      bias[i] = row < p.channels_out ? p.bias[row] : 0.0f;
    }
  }
  const bool adds = !kPlain && p.residual != nullptr;
  const int half = lane % 2;
  Walk walk(p, place + lane / 2);
  Vectors now, ahead;
  ahead.next(p, adds, walk, channel + half * kVec);
#pragma unroll
  for (int chunk = 0; chunk < kGroupPlaces / kChunk; ++chunk) {
    now = ahead;
    if (adds) {
#pragma unroll
      for (int i = 0; i < Vectors::kCount; ++i)
        *reinterpret_cast<uint4*>(spot(out, 16 * i + lane / 2, half)) = now.residual[i];
      sync_warp();
    }
    if (chunk + 1 < kGroupPlaces / kChunk) ahead.next(p, adds, walk, channel + half * kVec);
#pragma unroll
    for (int pair = 0; pair < kChunk / 16; ++pair) {  // of 8 places each
      uint8_t* row = spot(out, 16 * pair + lane / 16 * 8 + lane % 8, lane / 8 % 2);
      uint32_t m[4] = {};
      if (adds) load_transposed(m, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = chunk * (kChunk / 8) + 2 * pair + i / 2;
        Vec<scalar_t, 2> value;
        memcpy(static_cast<void*>(&value), m + i, 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float v = acc[4 * j + 2 * (i % 2) + k];
          if constexpr (!kPlain) {
            v += bias[i % 2];
            if (adds) v += to_float(value.v[k]);
            if (p.relu) v = gpu_relu(v);
          }
          value.v[k] = from_float<scalar_t>(v);
        }
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

  __device__ Inside(const Kernel& p, int place, int lane) {
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
__device__ __forceinline__ void write_statistics(const Kernel& p, int place, int channel, int lane, const float (&acc)[128]) {
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
  const int part = place / kGroupPlaces;
  if (channel == 0 && lane == 0) p.counts[part] = static_cast<float>(inside.count);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = channel + lane / 4 + 8 * i, which = lane % 4;  // of a quad's lanes one writes the mean, one the squares
    if (which < 2 && row < p.channels_out)
      p.moments[(int64_t{2} * part + which) * p.channels_out + row] = which == 0 ? mean[i] : squares[i];
  }
  sync_warp();  // products want their lanes together
}

template <bool kWhole, bool kStatistics, typename scalar_t>
__device__ __forceinline__ void compute(const Kernel& p, Shared<kWhole>& s, int group) {
  using P = Plan<kWhole>;
  const int warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  const int slices = (kWhole ? 1 : p.taps) * ((p.channels + kDepth - 1) / kDepth);
  Slot<P::kSlices> slice;
  Slot<P::kTaps> stage;
  for (Tile tile(p); tile; tile.next()) {
    float acc[128];
    int step = 0;
    Held held;
    if (group == 1 && p.lead >= 0) s.lead.wait(tile.number % 2);
    for (int i = 0; i < slices; ++i, slice.next()) {
      s.x_full[slice.index].wait(slice.parity);
      const uint8_t* x = s.x[slice.index] + group * kGroupPlaces * kRowBytes;
      multiply<kWhole, scalar_t>(p, s, x, slice.index, stage, held, group, lane, step, acc);
    }
    wait_for_products<0>();
    pin(acc);
    give_back(p, s, held, lane);
    const int place = tile.place() + group * kGroupPlaces, channel = tile.channel() + warp * kWarpChannels;
    if constexpr (kStatistics) round_all<scalar_t>(acc);
    finish<kStatistics, scalar_t>(p, s.out[4 * group + warp], place, channel, lane, acc);
    if constexpr (kStatistics) write_statistics(p, place, channel, lane, acc);
  }
}

#endif

template <bool kWhole, bool kStatistics, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 1) sm90_conv_wide_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  using P = Plan<kWhole>;
  Shared<kWhole>& s = shared_memory<Shared<kWhole>>();
  const int group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kSlices; ++i) s.x_full[i].init(1), s.x_empty[i].init(4 * kGroups * p.cluster);
    for (int i = 0; i < P::kTaps; ++i) s.weight_full[i].init(1), s.weight_empty[i].init(4 * kGroups);
    s.lead.init(1);
    publish_barriers();
    prefetch(p.x), prefetch(p.weight);
  }
  __syncthreads();
  sync_cluster(p.cluster);
  wait_for_kernel_before();
  let_next_kernel_begin();

  if (group < kGroups) {
    take_registers<kConsumerRegisters>();
    compute<kWhole, kStatistics, scalar_t>(p, s, group);
  } else {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x % kGroup == 0) load_operands<kWhole>(p, s);
  }
  sync_cluster(p.cluster);
#endif
}

bool is_same_size(const Span& s) { return s.stride == 1 && 2 * s.padding == (s.kernel - 1) * s.dilation; }

// Without what it points to, and without tiles where it cannot be launched so.
template <bool kWhole>
Kernel plan(const ConvActParams& c) {
  const Window& window = c.window;
  Kernel kernel{};
  kernel.window = window;
  kernel.taps = window.h.kernel * window.w.kernel;
  kernel.channels = c.x.channels;
  kernel.channels_out = c.channels_out;
  kernel.out = {c.x.count, window.h.out(c.x.height), window.w.out(c.x.width), c.channels_out};
  kernel.rows = kWhole ? c.x.height + window.h.padding : kernel.out.height;
  kernel.columns = kWhole ? c.x.width + window.w.padding : kernel.out.width;
  if (kWhole && !(is_same_size(window.h) && is_same_size(window.w) && kernel.taps >= kLeastWholeTaps)) return kernel;
  const int64_t reach = int64_t{window.h.kernel - 1} * window.h.dilation * kernel.columns +
                        int64_t{window.w.kernel - 1} * window.w.dilation;
  kernel.boxes = kMostBoxes;
  const int64_t box = ceil_div(ceil_div(kPlaces + (kWhole ? reach : 0), kernel.boxes), 8) * 8;  // whole periods of the swizzle
  const int64_t columns = ceil_div(c.channels_out, kChannelsOut);
  for (kernel.cluster = kMostCluster; columns % kernel.cluster != 0; kernel.cluster /= 2) {}
  kernel.share = kernel.boxes / kernel.cluster;
  kernel.columns_of_tiles = static_cast<int>(columns / kernel.cluster);
  const int64_t places = int64_t{c.x.count} * kernel.rows * kernel.columns;
  const int64_t tiles = ceil_div(places, kPlaces) * kernel.columns_of_tiles;
  if (box * kernel.boxes > Plan<kWhole>::kRows || places >= 1 << 30 || tiles >= 1 << 30) return kernel;
  kernel.box = static_cast<int>(box);
  kernel.tiles = static_cast<int>(tiles);
  const int64_t steps = ceil_div(c.x.channels, kDepth) * kernel.taps;
  kernel.lead = steps >= Plan<kWhole>::kTaps - Plan<kWhole>::kLead ? Plan<kWhole>::kLead : -1;
  return kernel;
}

// Relative: of the blocks' turns, each as long as its products or as what it takes from L2.
template <bool kWhole>
double duration(const Kernel& kernel, int multiprocessors) {
  constexpr double kProductCycles = 1024, kBytesPerCycle = 24;
  const double slice = double(kernel.boxes) * kernel.box * kRowBytes / kernel.cluster / (kWhole ? kernel.taps : 1);
  const int64_t turns = ceil_div(kernel.tiles, std::max(multiprocessors / kernel.cluster, 1));
  return double(turns) * kernel.taps * std::max(kProductCycles, (kTapBytes + slice) / kBytesPerCycle);
}

// The plan that takes less time, without tiles where there is none.
struct Chosen {
  Kernel kernel{};
  bool is_whole = false;

  explicit Chosen(const ConvActParams& params) {
    const int multiprocessors = multiprocessor_count();
    if (multiprocessors == 0) return;
    const Kernel whole = plan<true>(params);
    kernel = plan<false>(params);
    if (kernel.tiles == 0 || whole.tiles == 0) return;
    is_whole = duration<true>(whole, multiprocessors) <= duration<false>(kernel, multiprocessors);
    if (is_whole) kernel = whole;
  }
  int64_t parts() const { return kernel.tiles == 0 ? 0 : int64_t{kGroups} * kernel.tiles / kernel.columns_of_tiles; }
};

template <bool kWhole, bool kStatistics, typename scalar_t>
cudaError_t launch_typed(Kernel& kernel, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kWhole>);
  const auto entry = sm90_conv_wide_kernel<kWhole, kStatistics, scalar_t>;
  const void* function = reinterpret_cast<const void*>(entry);
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  static std::atomic<int> known[kMostCluster + 1];  // by cluster; a device that runs fewer lets some wait
  int clusters = known[kernel.cluster];
  if (status == cudaSuccess && clusters == 0) {
    status = clusters_at_once(&clusters, entry, kBlockThreads, kernel.cluster, kBytes);
    if (status == cudaSuccess && clusters == 0) status = cudaErrorInvalidConfiguration;
  }
  if (status != cudaSuccess) return status;
  known[kernel.cluster] = clusters;
  kernel.clusters = std::min(kernel.tiles, clusters);
  const unsigned blocks = static_cast<unsigned>(kernel.clusters * kernel.cluster);
  return launch_clusters_behind(entry, blocks, kBlockThreads, kernel.cluster, kernel, kBytes, stream);
}

template <bool kWhole, bool kStatistics>
cudaError_t launch_planned(const ConvActParams& c, Kernel& kernel, cudaStream_t stream) {
  // Whole, the TMA unit walks the line of places: all windows of as many pixels as there are zeros on a side, and one more.
  const auto line = [](const Span& s) { return kWhole ? Span{s.padding + 1, 1, s.padding, 1} : s; };
  const Window window{line(c.window.h), line(c.window.w)};
  cudaError_t status = make_image_map(&kernel.x, c.dtype, c.x_data, c.x, window, kernel.box);
  if (status == cudaSuccess)
    status = make_tile_map(&kernel.weight, c.dtype, c.weight, c.channels_out, kernel.taps, c.x.channels, kChannelsOut);
  if (status != cudaSuccess) return status;
  kernel.bias = c.bias;
  kernel.residual = c.residual;
  kernel.y = c.y;
  kernel.relu = c.relu;
  return c.dtype == DType::kFloat16 ? launch_typed<kWhole, kStatistics, __half>(kernel, stream)
                                    : launch_typed<kWhole, kStatistics, __nv_bfloat16>(kernel, stream);
}

template <bool kStatistics>
cudaError_t launch_chosen(const ConvActParams& params, Chosen& chosen, cudaStream_t stream) {
  if (chosen.kernel.tiles == 0) return cudaErrorInvalidValue;
  return chosen.is_whole ? launch_planned<true, kStatistics>(params, chosen.kernel, stream)
                         : launch_planned<false, kStatistics>(params, chosen.kernel, stream);
}

}  // namespace

cudaError_t launch_sm90_conv_wide(const ConvActParams& params, cudaStream_t stream) {
  Chosen chosen(params);
  return launch_chosen<false>(params, chosen, stream);
}

int64_t sm90_conv_wide_parts(const ConvActParams& params) { return Chosen(params).parts(); }

cudaError_t launch_sm90_conv_wide_statistics(const ConvStatisticsParams& params, cudaStream_t stream) {
  Chosen chosen(params.conv);
  if (chosen.parts() != params.parts) return cudaErrorInvalidValue;
  chosen.kernel.moments = params.moments;
  chosen.kernel.counts = params.counts;
  const cudaError_t status = launch_chosen<true>(params.conv, chosen, stream);
  return status == cudaSuccess ? launch_conv_statistics_merge(params, stream) : status;
}

}  // namespace fastres::cuda
