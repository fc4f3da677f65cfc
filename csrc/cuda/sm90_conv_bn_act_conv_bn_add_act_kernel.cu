// Formula: y = act(conv1x1(middle, last_weight) + last_bias + residual) of middle = act(conv(x, weight) + bias), rounded to y's
// type: products of matrices, channels by places, and middle never leaves shared memory.
// Layout: NHWC, pixels aligned to 16 bytes. A place is where a window may lie, row after row, image after image: a line of the
// pixels of x with the zeros before each row and above each image. A tile's slices of x, 64 channels each, are read once: the
// operand of a tap is that of the first one, moved by the same number of places for all. Each of two warpgroups computes its
// places by all channels: of middle, then, so many channels at a time, of y. Of the third, a thread brings x, one the
// weights, and one for each of the others the residual, in parts of 32 places x 64 channels, which their outputs replace.
// Bytes per output: residual and y once; x and weights once from memory; weights from L2 for every tile.
// Accumulate type: float, the products' own order; bias and residual are added in float; middle and y are rounded once.
// Invariants: places beyond the edges are read as zeros and never written; what is computed for places of zeros stays in their
// column of every product. A part of y is stored by one thread once all warps of its group have laid out their channels.
#include <algorithm>

#include "common/epilogue.h"
#include "cuda/conv_bn_act_conv_bn_add_act.h"
#include "cuda/device/sm90_wide.cuh"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

using namespace sm90;

constexpr int kGroup = 128, kGroups = 2;  // threads of a warpgroup; those that compute
constexpr int kBlockThreads = (kGroups + 1) * kGroup;
constexpr int kDepth = 64;                                        // channels of a slice, of a stage of weights
constexpr int kWarpChannels = 16;                                 // of every 64
constexpr int kPartPlaces = 32, kPartBytes = kPartPlaces * kRowBytes;
constexpr int kAccumulators = 128, kParts = 8;                    // of a thread; of a group's accumulators
constexpr int kBuffers = 4;                                       // of a group, for parts
constexpr int kBoxes = 4;                                         // that bring a slice
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

// kMiddle: channels of x and of middle.
template <int kMiddle>
struct Plan {
  static constexpr int kSlices = kMiddle / kDepth;
  static constexpr int kGroupPlaces = kGroup * kAccumulators / kMiddle, kPlaces = kGroups * kGroupPlaces;
  static constexpr int kRows = 640 / kSlices;  // of a slice in shared memory, at most
  static constexpr int kStageBytes = kMiddle * kRowBytes, kStages = (48 << 10) / kStageBytes;
  static constexpr int kHalves = kMiddle / 64, kHalfParts = kParts / kHalves;  // of the channels of an accumulator tile
};

struct Kernel {
  TileMap x, weight, last_weight, residual, y;
  Window window;
  int taps, passes;   // passes: over the output's channels
  int rows, columns;  // of places, of one image
  int height, width;
  int box;            // places
  int lead;           // steps that the first group is ahead of the second
  int tiles;
  const float *bias, *last_bias;
  bool relu, last_relu;
};

template <int kMiddle>
struct Shared {
  using P = Plan<kMiddle>;
  uint8_t x[P::kSlices][P::kRows * kRowBytes];  // these first: each is aligned to 1024 bytes
  uint8_t weight[P::kStages][P::kStageBytes];
  uint8_t middle[kGroups][P::kSlices][P::kGroupPlaces * kRowBytes];
  uint8_t part[kGroups][kBuffers][kPartBytes];
  int4 corner[kGroups][kBuffers];  // x, y, image of a part's first place
  Barrier x_full[P::kSlices], x_empty[P::kSlices], weight_full[P::kStages], weight_empty[P::kStages];
  Barrier part_full[kGroups][kBuffers], part_empty[kGroups][kBuffers];
  Barrier lead;  // the first group has begun its tile
};
static_assert(sizeof(Shared<64>) <= 227 << 10 && sizeof(Shared<128>) <= 227 << 10);

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
  int index, left, number = 0;

  __device__ explicit Tile(const Kernel& p) : index(static_cast<int>(blockIdx.x)), left(p.tiles - index) {}
  __device__ explicit operator bool() const { return left > 0; }
  __device__ int parity() const { return number % 2; }
  __device__ void next() { index += static_cast<int>(gridDim.x), left -= static_cast<int>(gridDim.x), ++number; }
};

// Where the output's pixel of a place lies, as the TMA unit's walk over the padded images counts.
struct Walk {
  int x, y, image;

  __device__ Walk(const Kernel& p, int place) {
    const int row = place / p.columns;
    x = place - row * p.columns;
    image = row / p.rows;
    y = row - image * p.rows;
    advance(p, 0);
  }
  __device__ void advance(const Kernel& p, int places) {
    for (x += places; x >= p.width; x -= p.columns) ++y;
    for (; y >= p.height; y -= p.rows) ++image;
  }
};

template <int kMiddle>
__device__ __forceinline__ void load_images(const Kernel& p, Shared<kMiddle>& s) {
  using P = Plan<kMiddle>;
  for (Tile tile(p); tile; tile.next()) {
    for (int slice = 0; slice < P::kSlices; ++slice) {
      Barrier& full = s.x_full[slice];
      s.x_empty[slice].wait(tile.parity() ^ 1);
      full.arrive_and_expect(kBoxes * p.box * kRowBytes);
      for (int i = 0; i < kBoxes; ++i) {
        const int place = tile.index * P::kPlaces + i * p.box, row = place / p.columns, image = row / p.rows;
        load_pixels(s.x[slice] + i * p.box * kRowBytes, p.x, full, slice * kDepth,
                    place - row * p.columns - p.window.w.padding, row - image * p.rows - p.window.h.padding, image, 0, 0);
      }
    }
  }
}

template <int kMiddle>
__device__ __forceinline__ void load_weights(const Kernel& p, Shared<kMiddle>& s) {
  using P = Plan<kMiddle>;
  Slot<P::kStages> stage;
  const auto load = [&](const TileMap& map, int slice, int tap, int row) {
    s.weight_empty[stage.index].wait(stage.parity ^ 1);
    s.weight_full[stage.index].arrive_and_expect(P::kStageBytes);
    load_tile(s.weight[stage.index], map, s.weight_full[stage.index], slice * kDepth, tap, row);
    stage.next();
  };
  for (Tile tile(p); tile; tile.next()) {
    for (int slice = 0; slice < P::kSlices; ++slice)
      for (int tap = 0; tap < p.taps; ++tap) load(p.weight, slice, tap, 0);
    for (int pass = 0; pass < p.passes; ++pass)
      for (int slice = 0; slice < P::kSlices; ++slice) load(p.last_weight, slice, 0, pass * kMiddle);
  }
}

template <int kMiddle>
__device__ __forceinline__ void load_residuals(const Kernel& p, Shared<kMiddle>& s, int group) {
  using P = Plan<kMiddle>;
  Slot<kBuffers> buffer;
  for (Tile tile(p); tile; tile.next()) {
    const Walk first(p, tile.index * P::kPlaces + group * P::kGroupPlaces);
    for (int channel = 0; channel < p.passes * kMiddle; channel += 64) {
      Walk at = first;
      for (int part = 0; part < P::kHalfParts; ++part, buffer.next(), at.advance(p, kPartPlaces)) {
        Barrier& full = s.part_full[group][buffer.index];
        s.part_empty[group][buffer.index].wait(buffer.parity ^ 1);
        s.corner[group][buffer.index] = make_int4(at.x, at.y, at.image, 0);
        full.arrive_and_expect(kPartBytes);
        load_pixels(s.part[group][buffer.index], p.residual, full, channel, at.x, at.y, at.image, 0, 0);
      }
    }
  }
}

// The places in shared memory of what products under way read: a stage, and the slice behind whose last tap they are.
struct Held {
  int stage = -1, slice = -1;
};

// One group's way through the tiles.
template <int kMiddle, typename scalar_t>
struct Group {
  using P = Plan<kMiddle>;
  const Kernel& p;
  Shared<kMiddle>& s;
  const int number = threadIdx.x / kGroup, warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  Slot<P::kStages> stage;
  Slot<kBuffers> buffer;
  Held held;
  bool is_first_part = true;

  __device__ Group(const Kernel& p, Shared<kMiddle>& s) : p(p), s(s) {}

  __device__ void give_back() {
    if (held.stage >= 0 && lane == 0) s.weight_empty[held.stage].arrive();
    if (held.slice >= 0 && lane == 0) s.x_empty[held.slice].arrive();
    held = {};
  }

  // Adds the products of one stage of weights with so many places; they are left under way.
  __device__ __forceinline__ void multiply(float (&acc)[kAccumulators], const uint8_t* places, bool is_first) {
    const uint8_t* weight = s.weight[stage.index];
    s.weight_full[stage.index].wait(stage.parity);
    pin(acc);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const int accumulate = !is_first || k > 0;
      if constexpr (kMiddle == 64) {
        wide_product<scalar_t>(acc, operand(weight + 32 * k), operand(places + 32 * k), accumulate);
      } else {
        product<scalar_t>(reinterpret_cast<float(&)[64]>(acc[0]), operand(weight + 32 * k), operand(places + 32 * k), accumulate);
        product<scalar_t>(reinterpret_cast<float(&)[64]>(acc[64]), operand(weight + 64 * kRowBytes + 32 * k),
                          operand(places + 32 * k), accumulate);
      }
    }
    commit_products();
    wait_for_products<1>();
    give_back();
    held = {stage.index, -1};
    stage.next();
  }

  __device__ __forceinline__ void end_products(float (&acc)[kAccumulators]) {
    wait_for_products<0>();
    pin(acc);
    give_back();
  }

  __device__ __forceinline__ void convolve(float (&acc)[kAccumulators], const Tile& tile) {
    const Span &h = p.window.h, &w = p.window.w;
    int step = 0;
    if (number == 1) s.lead.wait(tile.parity());
    for (int slice = 0; slice < P::kSlices; ++slice) {
      s.x_full[slice].wait(tile.parity());
      const uint8_t* x = s.x[slice] + number * P::kGroupPlaces * kRowBytes;
      for (int down = 0; down < h.kernel; ++down) {
        for (int right = 0; right < w.kernel; ++right, ++step) {
          multiply(acc, x + (down * h.dilation * p.columns + right * w.dilation) * kRowBytes, step == 0);
          if (step == p.lead && number == 0 && threadIdx.x == 0) s.lead.arrive();
        }
      }
      held.slice = slice;
    }
  }

  // The bias of this lane's rows of the accumulators: of every 64 channels, two.
  struct Bias {
    float of[P::kHalves][2];

    __device__ Bias(const float* bias, int row) {
#pragma unroll
      for (int half = 0; half < P::kHalves; ++half)
        for (int i = 0; i < 2; ++i) of[half][i] = bias[64 * half + row + 8 * i];
    }
  };

  // This lane's row of the four matrices that a warp lays out, or reads, for 16 places and its 16 of 64 channels.
  __device__ uint8_t* row_of(uint8_t* places, int pair) const {
    const int place = 16 * pair + lane / 16 * 8 + lane % 8, eight = 2 * warp + lane / 8 % 2;
    return places + place * kRowBytes + (eight ^ place % 8) * 16;
  }

  // Of a part of the accumulators, with what memory holds where the sum goes or without: bias, ReLU, rounding.
  template <bool kAdds>
  __device__ __forceinline__ void lay_out(const float (&acc)[kAccumulators], int part, const Bias& bias, bool relu, uint8_t* places) {
#pragma unroll
    for (int pair = 0; pair < kPartPlaces / 16; ++pair) {
      uint8_t* row = row_of(places, pair);
      uint32_t m[4] = {};
      if constexpr (kAdds) load_transposed(m, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = part * (kPartPlaces / 8) + 2 * pair + i / 2;
        Vec<scalar_t, 2> value;
        memcpy(static_cast<void*>(&value), m + i, 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float v = acc[4 * j + 2 * (i % 2) + k] + bias.of[part / P::kHalfParts][i % 2];
          if constexpr (kAdds) v += to_float(value.v[k]);
          value.v[k] = from_float<scalar_t>(relu ? gpu_relu(v) : v);
        }
        memcpy(m + i, static_cast<const void*>(&value), 4);
      }
      store_transposed(row, m);
    }
  }

  __device__ __forceinline__ void keep(const float (&acc)[kAccumulators], const Bias& bias) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      lay_out<false>(acc, part, bias, p.relu,
                     s.middle[number][part / P::kHalfParts] + part % P::kHalfParts * kPartBytes);
    publish_shared();
    sync_group(number);
  }

  __device__ __forceinline__ void finish(const float (&acc)[kAccumulators], const Bias& bias, int channel) {
#pragma unroll
    for (int part = 0; part < kParts; ++part, buffer.next()) {
      uint8_t* places = s.part[number][buffer.index];
      s.part_full[number][buffer.index].wait(buffer.parity);
      lay_out<true>(acc, part, bias, p.last_relu, places);
      publish_shared();
      sync_group(number);
      if (threadIdx.x % kGroup == 0) {
        const int4 at = s.corner[number][buffer.index];
        store_pixels(p.y, places, channel + part / P::kHalfParts * 64, at.x, at.y, at.z);
        commit_stores();
        give_back_part<1>(buffer.index == 0 ? kBuffers - 1 : buffer.index - 1);
      }
    }
  }

  // The buffer of the part before the last one or, at the end, of the last.
  template <int kLeft>
  __device__ __forceinline__ void give_back_part(int index) {
    wait_for_stores_but<kLeft>();
    if (!is_first_part) s.part_empty[number][index].arrive();
    is_first_part = false;
  }

  __device__ __forceinline__ void run() {
    const int row = warp * kWarpChannels + lane / 4;
    for (Tile tile(p); tile; tile.next()) {
      float acc[kAccumulators];
      const Bias bias(p.bias, row);
      convolve(acc, tile);
      end_products(acc);
      keep(acc, bias);
      for (int channel = 0; channel < p.passes * kMiddle; channel += kMiddle) {
        const Bias last_bias(p.last_bias + channel, row);
        for (int slice = 0; slice < P::kSlices; ++slice) multiply(acc, s.middle[number][slice], slice == 0);
        end_products(acc);
        finish(acc, last_bias, channel);
      }
    }
    if (threadIdx.x % kGroup == 0) wait_for_stores_but<0>();
  }
};

#endif

template <int kMiddle, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 1) sm90_conv_act_conv_act_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  using P = Plan<kMiddle>;
  Shared<kMiddle>& s = shared_memory<Shared<kMiddle>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kSlices; ++i) s.x_full[i].init(1), s.x_empty[i].init(4 * kGroups);
    for (int i = 0; i < P::kStages; ++i) s.weight_full[i].init(1), s.weight_empty[i].init(4 * kGroups);
    for (int group = 0; group < kGroups; ++group)
      for (int i = 0; i < kBuffers; ++i) s.part_full[group][i].init(1), s.part_empty[group][i].init(1);
    s.lead.init(1);
    publish_barriers();
    prefetch(p.x), prefetch(p.weight), prefetch(p.last_weight), prefetch(p.residual), prefetch(p.y);
  }
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_begin();

  if (threadIdx.x < kGroups * kGroup) {
    take_registers<kConsumerRegisters>();
    Group<kMiddle, scalar_t>(p, s).run();
  } else {
    give_up_registers<kProducerRegisters>();
    const int warp = threadIdx.x % kGroup / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) load_images<kMiddle>(p, s);
    if (warp == 1) load_weights<kMiddle>(p, s);
    if (warp >= 2) load_residuals<kMiddle>(p, s, warp - 2);
  }
#endif
}

int multiprocessor_count() {
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : 0;
}

template <int kMiddle, typename scalar_t>
cudaError_t launch_typed(const Kernel& kernel, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kMiddle>);
  const auto entry = sm90_conv_act_conv_act_kernel<kMiddle, scalar_t>;
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(entry),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const unsigned blocks = static_cast<unsigned>(std::min(kernel.tiles, multiprocessors));
  return launch_behind(entry, dim3(blocks), dim3(kBlockThreads), kernel, kBytes, stream);
}

template <int kMiddle>
cudaError_t launch(const ConvActConvActParams& c, cudaStream_t stream) {
  using P = Plan<kMiddle>;
  const Span &h = c.window.h, &w = c.window.w;
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return cudaErrorInvalidDevice;
  Kernel kernel{};
  kernel.window = c.window;
  kernel.taps = h.kernel * w.kernel;
  kernel.passes = c.channels_out / kMiddle;
  kernel.lead = std::min(P::kStages - 2, kernel.taps * P::kSlices - 1);
  kernel.height = c.x.height, kernel.width = c.x.width;
  kernel.rows = c.x.height + h.padding, kernel.columns = c.x.width + w.padding;
  kernel.bias = c.bias, kernel.last_bias = c.last_bias;
  kernel.relu = c.relu, kernel.last_relu = c.last_relu;
  const int64_t reach = int64_t{h.kernel - 1} * h.dilation * kernel.columns + int64_t{w.kernel - 1} * w.dilation;
  const int64_t box = ceil_div(ceil_div(P::kPlaces + reach, kBoxes), 8) * 8;  // whole periods of the swizzle
  const int64_t places = int64_t{c.x.count} * kernel.rows * kernel.columns;
  if (box * kBoxes > P::kRows || places >= 1 << 30) return cudaErrorInvalidValue;
  kernel.box = static_cast<int>(box);
  kernel.tiles = static_cast<int>(ceil_div(places, P::kPlaces));
  // The TMA unit walks the line of places: all windows of as many pixels as there are zeros on a side, and one more.
  const auto line = [](const Span& s) { return Span{s.padding + 1, 1, s.padding, 1}; };
  const Window window{line(h), line(w)};
  Images y = c.x;
  y.channels = c.channels_out;
  cudaError_t status = make_image_map(&kernel.x, c.dtype, c.x_data, c.x, window, kernel.box);
  const auto then = [&](cudaError_t next) { status = status == cudaSuccess ? next : status; };
  then(make_tile_map(&kernel.weight, c.dtype, c.weight, kMiddle, kernel.taps, kMiddle, kMiddle));
  then(make_tile_map(&kernel.last_weight, c.dtype, c.last_weight, c.channels_out, 1, kMiddle, kMiddle));
  then(make_image_map(&kernel.residual, c.dtype, c.residual, y, window, kPartPlaces));
  then(make_image_map(&kernel.y, c.dtype, c.y, y, window, kPartPlaces));
  if (status != cudaSuccess) return status;
  return c.dtype == DType::kFloat16 ? launch_typed<kMiddle, __half>(kernel, multiprocessors, stream)
                                    : launch_typed<kMiddle, __nv_bfloat16>(kernel, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_sm90_conv_act_conv_act(const ConvActConvActParams& params, cudaStream_t stream) {
  if (params.channels_out % params.x.channels != 0) return cudaErrorInvalidValue;
  if (params.x.channels == 64) return launch<64>(params, stream);
  return params.x.channels == 128 ? launch<128>(params, stream) : cudaErrorInvalidValue;
}

}  // namespace fastres::cuda
