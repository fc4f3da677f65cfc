// Formula: y = act(conv(x, weight) + bias [+ residual]), as products of matrices: output channels by places. Or, for the batch
// norm behind it in training, y = conv(x, weight), and of each channel the statistics of every 256 places. Or, of a gradient by
// the weight turned, the gradient of the output of the batch norm before, behind its ReLU, and of every 256 places its sums.
// A place is where a window may lie, row after row, image after image: a line. Two ways to find what lies under a tap:
//   by tap: places are output pixels; the TMA unit reads x under one tap of them at a time;
//   whole (stride 1, y of x's size): places are the pixels of x with the zeros before each row and above each image; what
//   follows a row or an image is what precedes the next. x is read once, with what the last windows reach beyond: the operand
//   of a tap is that of the first one, moved by the same number of places for all outputs.
// Layout: NHWC, pixels aligned to 16 bytes; a tile is of 512 places x 64 output channels; the blocks of a cluster take tiles
// of the same places, share the slices of x, 64 channels each, and walk on together. Of a block's warpgroups one moves data: a
// thread slices of x, by tap each warpgroup's half by itself, another the weights of their taps; two compute 256 places each,
// the second some taps behind the first, so that while one finishes its tile the other's products run.
// Bytes per output: residual (gradients: the batch norm's input) and y once, x and weights once from memory. From L2, for each
// tap of a slice (1,024 cycles of products): 8 KiB of weights, and of x 64 KiB by tap, whole so much for all taps, divided by the
// blocks of a cluster. An H200 gives a multiprocessor about 24 bytes a cycle.
// Products: whole, places of zeros are computed too and left out: with a 3x3 window, (1 + 1 / width)(1 + 1 / height).
// Accumulate type: float, the products' own order; bias and residual are added in float; one rounding, to y's type. Statistics
// are of the rounded values, in two passes over registers: the mean, then deviations from it; so are the sums of gradients.
// Invariants: places beyond the edges are read as zeros, never written and in no statistics; a warp lays out its own 16 channels
// by itself; no block ends while another of its cluster may write to its memory.
#include <algorithm>
#include <atomic>

#include "cuda/conv_wide.h"
#include "cuda/device/ring.cuh"
#include "cuda/device/sm90_wide_sums.cuh"

namespace fastres::cuda {
namespace wide {

constexpr int kGroup = 128, kGroups = 2;  // threads of a warpgroup; those that compute
constexpr int kBlockThreads = (kGroups + 1) * kGroup;
constexpr int kPlaces = kGroups * kGroupPlaces;
constexpr int kChannelsOut = 64, kDepth = 64;    // of a tile; of a slice of x and of a tap's weight
constexpr int kMostCluster = 4;                  // blocks
constexpr int kBoxes = 4;                        // that bring a slice: a multiple of the cluster
constexpr int kTapBytes = kChannelsOut * kRowBytes;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

template <bool kWhole>
struct Plan {
  static constexpr int kRows = kWhole ? 640 : kPlaces;  // of a slice in shared memory, at most
  static constexpr int kSlices = kWhole ? 2 : 3, kTaps = kWhole ? 7 : 3;  // of the rings
  static constexpr int kLead = kWhole ? 4 : 1;  // taps that the first warpgroup is ahead of the second
  static constexpr int kParts = kWhole ? 1 : kGroups;  // of a slice, filled and given back each by itself: by tap of a warpgroup
};
constexpr int kLeastWholeTaps = 5;  // of a window
static_assert(Plan<true>::kLead < kLeastWholeTaps);

// Of the accumulators: folded weights, with bias, residual and ReLU; statistics beside values as they are; gradients.
enum class End { kFolded, kStatistics, kGradient };

struct Kernel : Outputs {
  TileMap x, weight;
  Window window;
  int taps, channels;
  bool turned;             // taps of the weight: the last one is that of the first place
  int box;                 // places of each box of a slice
  int cluster, clusters;   // blocks; how many
  int share;               // boxes that a block loads for its cluster
  int tiles, columns_of_tiles;  // of clusters
  int lead;                // see Plan; negative where tiles are too short for it
};

template <bool kWhole>
struct Shared {
  using P = Plan<kWhole>;
  uint8_t x[P::kSlices][P::kRows * kRowBytes];  // these first: each is aligned to 1024 bytes
  uint8_t weight[P::kTaps][kTapBytes];
  uint8_t out[kGroups * 4][kChunk * kWarpChannels * 2];
  int4 corners[kBoxes];  // of the boxes: x, y, image of the first place's window
  Barrier x_full[P::kSlices][P::kParts], x_empty[P::kSlices][P::kParts];
  Barrier weight_full[P::kTaps], weight_empty[P::kTaps];
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

// Of the boxes that this block loads.
template <bool kWhole>
__device__ __forceinline__ void find_corners(const Kernel& p, Shared<kWhole>& s, int place) {
  for (int i = 0; i < p.share; ++i, place += p.box) {
    const int row = place / p.columns, image = row / p.rows;
    s.corners[i] = make_int4((place - row * p.columns) * p.window.w.stride - p.window.w.padding,
                             (row - image * p.rows) * p.window.h.stride - p.window.h.padding, image, 0);
  }
}

// This block's boxes of each slice, to all blocks of the cluster; each block waits for the bytes of all boxes.
template <bool kWhole>
__device__ __forceinline__ void load_slices(const Kernel& p, Shared<kWhole>& s) {
  using P = Plan<kWhole>;
  const int first = rank_in_cluster() * p.share;  // box
  Slot<P::kSlices> slice;
  for (Tile tile(p); tile; tile.next()) {
    find_corners(p, s, tile.place() + first * p.box);
    for (int tap = 0; tap < (kWhole ? 1 : p.taps); ++tap) {
      const int row = tap / p.window.w.kernel;
      const int down = row * p.window.h.dilation, right = (tap - row * p.window.w.kernel) * p.window.w.dilation;
      for (int channel = 0; channel < p.channels; channel += kDepth, slice.next()) {
        for (int part = 0; part < P::kParts; ++part) {
          Barrier& full = s.x_full[slice.index][part];
          s.x_empty[slice.index][part].wait(slice.parity ^ 1);
          full.arrive_and_expect(kBoxes / P::kParts * p.box * kRowBytes);
          for (int i = 0; i < p.share; ++i) {
            const int4 at = s.corners[i];
            uint8_t* to = s.x[slice.index] + (first + i) * p.box * kRowBytes;
            if ((first + i) * P::kParts / kBoxes != part) continue;
            if (p.cluster == 1) load_pixels(to, p.x, full, channel, at.x, at.y, at.z, right, down);
            else load_pixels_everywhere(to, p.x, full, channel, at.x, at.y, at.z, right, down, p.cluster);
          }
        }
      }
    }
  }
}

// The weights of each slice's taps.
template <bool kWhole>
__device__ __forceinline__ void load_weights(const Kernel& p, Shared<kWhole>& s) {
  const int apart = kWhole ? 1 : p.taps, together = kWhole ? p.taps : 1;  // taps with slices of their own, of a slice
  Slot<Plan<kWhole>::kTaps> stage;
  for (Tile tile(p); tile; tile.next()) {
    for (int tap = 0; tap < apart; ++tap) {
      for (int channel = 0; channel < p.channels; channel += kDepth) {
        for (int i = 0; i < together; ++i, stage.next()) {
          s.weight_empty[stage.index].wait(stage.parity ^ 1);
          s.weight_full[stage.index].arrive_and_expect(kTapBytes);
          const int of = p.turned ? p.taps - 1 - tap - i : tap + i;
          load_tile(s.weight[stage.index], p.weight, s.weight_full[stage.index], channel, of, tile.channel());
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
__device__ __forceinline__ void give_back(const Kernel& p, Shared<kWhole>& s, const Held& held, int group, int lane) {
  if (held.stage >= 0 && lane == 0) s.weight_empty[held.stage].arrive();
  if (held.slice >= 0 && lane < p.cluster) arrive_at(s.x_empty[held.slice][kWhole ? 0 : group], lane);
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
      give_back(p, s, held, group, lane);
      held = {stage.index, -1};
      if (step == p.lead && group == 0 && threadIdx.x == 0) s.lead.arrive();
    }
  }
  held.slice = slice;
}

// What a tile's end does with values.
template <End kEnd, typename scalar_t>
using Change = std::conditional_t<kEnd == End::kFolded, Folded<scalar_t>,
                                  std::conditional_t<kEnd == End::kGradient, Gradient<scalar_t>, Plain<scalar_t>>>;

template <bool kWhole, End kEnd, typename scalar_t>
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
    const int place = tile.place() + group * kGroupPlaces, channel = tile.channel() + warp * kWarpChannels;
    Change<kEnd, scalar_t> change(p, channel, lane);  // its parameters are read before the products
    if (group == 1 && p.lead >= 0) s.lead.wait(tile.number % 2);
    for (int i = 0; i < slices; ++i, slice.next()) {
      s.x_full[slice.index][kWhole ? 0 : group].wait(slice.parity);
      const uint8_t* x = s.x[slice.index] + group * kGroupPlaces * kRowBytes;
      multiply<kWhole, scalar_t>(p, s, x, slice.index, stage, held, group, lane, step, acc);
    }
    wait_for_products<0>();
    pin(acc);
    give_back(p, s, held, group, lane);
    if constexpr (kEnd == End::kStatistics) round_all<scalar_t>(acc);
    finish<scalar_t>(p, s.out[4 * group + warp], place, channel, lane, acc, change);
    if constexpr (kEnd == End::kStatistics) write_statistics(p, place, channel, lane, acc);
    if constexpr (kEnd == End::kGradient) change.write(p, place, channel, lane);
  }
}

#endif

template <bool kWhole, End kEnd, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 1) sm90_conv_wide_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  using P = Plan<kWhole>;
  Shared<kWhole>& s = shared_memory<Shared<kWhole>>();
  const int group = threadIdx.x / kGroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kSlices; ++i)
      for (int part = 0; part < P::kParts; ++part)
        s.x_full[i][part].init(1), s.x_empty[i][part].init(4 * kGroups / P::kParts * p.cluster);
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
    compute<kWhole, kEnd, scalar_t>(p, s, group);
  } else {
    give_up_registers<kProducerRegisters>();
    if (threadIdx.x % kGroup == 0) load_slices<kWhole>(p, s);
    if (threadIdx.x % kGroup == 32) load_weights<kWhole>(p, s);
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
  const int64_t box = ceil_div(ceil_div(kPlaces + (kWhole ? reach : 0), kBoxes), 8) * 8;  // whole periods of the swizzle
  const int64_t columns = ceil_div(c.channels_out, kChannelsOut);
  for (kernel.cluster = kMostCluster; columns % kernel.cluster != 0; kernel.cluster /= 2) {}
  kernel.share = kBoxes / kernel.cluster;
  kernel.columns_of_tiles = static_cast<int>(columns / kernel.cluster);
  const int64_t places = int64_t{c.x.count} * kernel.rows * kernel.columns;
  const int64_t tiles = ceil_div(places, kPlaces) * kernel.columns_of_tiles;
  if (box * kBoxes > Plan<kWhole>::kRows || places >= 1 << 30 || tiles >= 1 << 30) return kernel;
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
  const double slice = double(kBoxes) * kernel.box * kRowBytes / kernel.cluster / (kWhole ? kernel.taps : 1);
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

template <bool kWhole, End kEnd, typename scalar_t>
cudaError_t launch_typed(Kernel& kernel, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kWhole>);
  const auto entry = sm90_conv_wide_kernel<kWhole, kEnd, scalar_t>;
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

template <bool kWhole, End kEnd>
cudaError_t launch_planned(const ConvActParams& c, Kernel& kernel, cudaStream_t stream) {
  // Whole, the TMA unit walks the line of places: all windows of as many pixels as there are zeros on a side, and one more.
  const auto line = [](const Span& s) { return kWhole ? Span{s.padding + 1, 1, s.padding, 1} : s; };
  const Window window{line(c.window.h), line(c.window.w)};
  cudaError_t status = make_image_map(&kernel.x, c.dtype, c.x_data, c.x, window, kernel.box);
  if (status == cudaSuccess)
    status = make_tile_map(&kernel.weight, c.dtype, c.weight, c.channels_out, kernel.taps, c.x.channels, kChannelsOut);
  if (status != cudaSuccess) return status;
  kernel.bias = c.bias;
  kernel.read = c.residual;
  kernel.y = c.y;
  kernel.relu = c.relu;
  return c.dtype == DType::kFloat16 ? launch_typed<kWhole, kEnd, __half>(kernel, stream)
                                    : launch_typed<kWhole, kEnd, __nv_bfloat16>(kernel, stream);
}

template <End kEnd>
cudaError_t launch_chosen(const ConvActParams& params, Chosen& chosen, cudaStream_t stream) {
  if (chosen.kernel.tiles == 0) return cudaErrorInvalidValue;
  return chosen.is_whole ? launch_planned<true, kEnd>(params, chosen.kernel, stream)
                         : launch_planned<false, kEnd>(params, chosen.kernel, stream);
}

}  // namespace wide

using wide::Chosen;
using wide::End;

cudaError_t launch_sm90_conv_wide(const ConvActParams& params, cudaStream_t stream) {
  Chosen chosen(params);
  return wide::launch_chosen<End::kFolded>(params, chosen, stream);
}

int64_t sm90_conv_wide_parts(const ConvActParams& params) { return Chosen(params).parts(); }

cudaError_t launch_sm90_conv_wide_statistics(const ConvStatisticsParams& params, cudaStream_t stream) {
  Chosen chosen(params.conv);
  if (chosen.parts() != params.parts) return cudaErrorInvalidValue;
  chosen.kernel.sums = params.moments;
  chosen.kernel.counts = params.counts;
  const cudaError_t status = wide::launch_chosen<End::kStatistics>(params.conv, chosen, stream);
  return status == cudaSuccess ? launch_conv_statistics_merge(params, stream) : status;
}

cudaError_t launch_sm90_conv_wide_gradient(const ConvGradientParams& params, cudaStream_t stream) {
  const BnActBackwardParams& norm = params.norm;
  Chosen chosen(params.conv);
  if (chosen.parts() != norm.geometry.splits) return cudaErrorInvalidValue;
  chosen.kernel.norm = {norm.weight, norm.bias, norm.mean, norm.var, norm.eps};
  chosen.kernel.sums = norm.partial;
  chosen.kernel.turned = true;
  cudaError_t status = wide::launch_chosen<End::kGradient>(params.conv, chosen, stream);
  if (status == cudaSuccess) status = launch_bn_backward_merge(norm, stream);
  return status == cudaSuccess ? launch_bn_backward_input(norm, stream) : status;
}

}  // namespace fastres::cuda
