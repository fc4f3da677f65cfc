// Formula: y = act(conv1x1(middle, last_weight) + last_bias + residual) of middle = act(conv(x, weight) + bias), and where asked
// for z = act(conv1x1(y, next_weight) + next_bias); middle and y rounded to their type. Products of matrices, channels by places;
// middle never leaves shared memory, and y is read from there.
// Layout: NHWC, pixels aligned to 16 bytes. A place is where a window may lie, row after row, image after image: a line of the
// pixels of x with the zeros before each row and above each image. A tile's slices of x, 64 channels each, are read once: the
// operand of a tap is that of the first one, moved by the same number of places for all. Each of two warpgroups computes its
// places: all channels of middle, then of 128 places 64 channels of y at a time, to whose end z grows by their products. Of
// the third, a thread brings x, one the weights, and one for each of the others the residual, in parts of 32 places x 64
// channels, which their outputs replace.
// Bytes per output: residual, y and z once; x and weights once from memory; weights from L2 for every tile.
// Accumulate type: float, the products' own order; bias and residual are added in float; each of the three is rounded once.
// Invariants: places beyond the edges are read as zeros and never written; what is computed for places of zeros stays in their
// column of every product. A part is stored by one thread once all warps of its group have laid out their channels.
#include <algorithm>

#include "common/epilogue.h"
#include "cuda/conv_bn_act_conv_bn_add_act.h"
#include "cuda/device/ring.cuh"
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
constexpr int kColumn = 128;                                      // places that are finished together
constexpr int kParts = kColumn / kPartPlaces, kBuffers = 4;       // of a column; of a group
constexpr int kBoxes = 4;                                         // that bring a slice
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 168 each at launch

// kMiddle: channels of x, of middle and of z.
template <int kMiddle>
struct Plan {
  static constexpr int kSlices = kMiddle / kDepth;
  static constexpr int kColumns = 2 / kSlices;  // of a group: its accumulators of middle are 128
  static constexpr int kGroupPlaces = kColumns * kColumn, kPlaces = kGroups * kGroupPlaces;
  static constexpr int kRows = 640 / kSlices;  // of a slice in shared memory, at most
  static constexpr int kStageBytes = kMiddle * kRowBytes, kStages = (48 << 10) / kStageBytes;
};

struct Kernel {
  TileMap x, weight, last_weight, next_weight, residual, y, z;
  Window window;
  int taps, channels_out;
  int rows, columns;  // of places, of one image
  int height, width;
  int box;            // places
  int lead;           // steps that the first group is ahead of the second
  int tiles;
  const float *bias, *last_bias, *next_bias;
  bool relu, last_relu, next_relu;
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

// Fills the ring: of each tap and slice of the first convolution a stage, then for 64 channels of y one of the last, all slices,
// and one of the next.
template <int kMiddle, bool kNext>
__device__ __forceinline__ void load_weights(const Kernel& p, Shared<kMiddle>& s) {
  using P = Plan<kMiddle>;
  Slot<P::kStages> stage;
  const auto load = [&](const TileMap& map, int boxes, int column, int tap, int row) {
    s.weight_empty[stage.index].wait(stage.parity ^ 1);
    s.weight_full[stage.index].arrive_and_expect(P::kStageBytes);
    for (int i = 0; i < boxes; ++i)
      load_tile(s.weight[stage.index] + i * 64 * kRowBytes, map, s.weight_full[stage.index], column + i * kDepth, tap, row);
    stage.next();
  };
  for (Tile tile(p); tile; tile.next()) {
    for (int slice = 0; slice < P::kSlices; ++slice)
      for (int tap = 0; tap < p.taps; ++tap) load(p.weight, 1, slice * kDepth, tap, 0);
    for (int i = 0; i < P::kColumns; ++i) {
      for (int channel = 0; channel < p.channels_out; channel += 64) {
        load(p.last_weight, P::kSlices, 0, 0, channel);
        if (kNext) load(p.next_weight, 1, channel, 0, 0);
      }
    }
  }
}

// Fills the buffers of a group, those for z with nothing.
template <int kMiddle, bool kNext>
__device__ __forceinline__ void load_residuals(const Kernel& p, Shared<kMiddle>& s, int group) {
  using P = Plan<kMiddle>;
  Slot<kBuffers> buffer;
  const int channels = p.channels_out + (kNext ? kMiddle : 0);
  for (Tile tile(p); tile; tile.next()) {
    for (int column = 0; column < P::kColumns; ++column) {
      const Walk first(p, tile.index * P::kPlaces + group * P::kGroupPlaces + column * kColumn);
      for (int channel = 0; channel < channels; channel += 64) {
        Walk at = first;
        for (int part = 0; part < kParts; ++part, buffer.next(), at.advance(p, kPartPlaces)) {
          Barrier& full = s.part_full[group][buffer.index];
          s.part_empty[group][buffer.index].wait(buffer.parity ^ 1);
          s.corner[group][buffer.index] = make_int4(at.x, at.y, at.image, 0);
          if (channel >= p.channels_out) {
            full.arrive();
          } else {
            full.arrive_and_expect(kPartBytes);
            load_pixels(s.part[group][buffer.index], p.residual, full, channel, at.x, at.y, at.image, 0, 0);
          }
        }
      }
    }
  }
}

// What products under way read of shared memory: a stage, the slice behind whose last tap they are, a part.
struct Held {
  int stage = -1, slice = -1, part = -1;
};

// One group's way through the tiles.
template <int kMiddle, bool kNext, typename scalar_t>
struct Group {
  using P = Plan<kMiddle>;
  const Kernel& p;
  Shared<kMiddle>& s;
  const int number = threadIdx.x / kGroup, warp = threadIdx.x % kGroup / 32, lane = threadIdx.x % 32;
  Slot<P::kStages> stage;
  Slot<kBuffers> buffer;
  Held held;
  int stored = -1;  // the buffer whose part this thread stored last

  __device__ Group(const Kernel& p, Shared<kMiddle>& s) : p(p), s(s) {}

  // A group of products has been issued, which reads this: those before are waited for, and what they read is given back.
  __device__ __forceinline__ void issued(const Held& reads) {
    commit_products();
    wait_for_products<1>();
    give_back();
    held = reads;
  }
  template <int kCount>
  __device__ __forceinline__ void end_products(float (&acc)[kCount]) {
    wait_for_products<0>();
    pin(acc);
    give_back();
  }
  __device__ __forceinline__ void give_back() {
    if (lane == 0) {
      if (held.stage >= 0) s.weight_empty[held.stage].arrive();
      if (held.slice >= 0) s.x_empty[held.slice].arrive();
      if (held.part >= 0) s.part_empty[number][held.part].arrive();
    }
    held = {};
  }

  // Adds the products of a stage of the first convolution with all of the group's places.
  __device__ __forceinline__ void multiply(float (&acc)[128], const uint8_t* places) {
    const uint8_t* weight = s.weight[stage.index];
    s.weight_full[stage.index].wait(stage.parity);
    pin(acc);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      if constexpr (kMiddle == 64) {
        wide_product<scalar_t>(acc, operand(weight + 32 * k), operand(places + 32 * k), 1);
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
          product<scalar_t>(reinterpret_cast<float(&)[64]>(acc[64 * half]), operand(weight + half * 64 * kRowBytes + 32 * k),
                            operand(places + 32 * k), 1);
      }
    }
    issued({stage.index, -1, -1});
    stage.next();
  }

  __device__ __forceinline__ void convolve(float (&acc)[128], const Tile& tile) {
    const Span &h = p.window.h, &w = p.window.w;
    int step = 0;
    if (number == 1) s.lead.wait(tile.parity());
    for (int slice = 0; slice < P::kSlices; ++slice) {
      s.x_full[slice].wait(tile.parity());
      const uint8_t* x = s.x[slice] + number * P::kGroupPlaces * kRowBytes;
      for (int down = 0; down < h.kernel; ++down) {
        for (int right = 0; right < w.kernel; ++right, ++step) {
          multiply(acc, x + (down * h.dilation * p.columns + right * w.dilation) * kRowBytes);
          if (step == p.lead && number == 0 && threadIdx.x == 0) s.lead.arrive();
        }
      }
      held.slice = slice;
    }
    end_products(acc);
  }

  // 64 channels of y, without bias and residual, for a column of places.
  __device__ __forceinline__ void multiply_middle(float (&acc)[64], int column) {
    const uint8_t* weight = s.weight[stage.index];
    s.weight_full[stage.index].wait(stage.parity);
    pin(acc);
    begin_products();
#pragma unroll
    for (int k = 0; k < kMiddle / 16; ++k) {
      const uint8_t* places = s.middle[number][k / 4] + column * kColumn * kRowBytes;
      product<scalar_t>(acc, operand(weight + k / 4 * 64 * kRowBytes + 32 * (k % 4)), operand(places + 32 * (k % 4)), 1);
    }
    issued({stage.index, -1, -1});
    stage.next();
    end_products(acc);
  }

  // Adds to z the products of a part of y, which lies in this buffer; the part of the column, and so the accumulators, kPart.
  template <int kPart>
  __device__ __forceinline__ void multiply_part(float (&acc)[kMiddle]) {
    const uint8_t *weight = s.weight[stage.index], *places = s.part[number][buffer.index];
    if (kPart == 0) s.weight_full[stage.index].wait(stage.parity);
    pin(acc);
    begin_products();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
      for (int half = 0; half < P::kSlices; ++half)
        narrow_product<scalar_t>(reinterpret_cast<float(&)[16]>(acc[64 * half + 16 * kPart]),
                                 operand(weight + half * 64 * kRowBytes + 32 * k), operand(places + 32 * k), 1);
    issued({kPart == kParts - 1 ? stage.index : -1, -1, buffer.index});
    if (kPart == kParts - 1) stage.next();
  }

  // The bias of this lane's rows of 64 channels.
  struct Bias {
    float of[2];
  };
  __device__ Bias bias_of(const float* bias, int channel) const {
    bias += channel + warp * kWarpChannels + lane / 4;
    return {{bias[0], bias[8]}};
  }

  // Of 64 channels and 32 places, with what memory holds where the sum goes or without: bias, ReLU, rounding.
  template <bool kAdds>
  __device__ __forceinline__ void lay_out(const float* acc, const Bias& bias, bool relu, uint8_t* places) {
#pragma unroll
    for (int pair = 0; pair < kPartPlaces / 16; ++pair) {
      // This lane's row of the four matrices of 16 places and the warp's channels.
      const int place = 16 * pair + lane / 16 * 8 + lane % 8, eight = 2 * warp + lane / 8 % 2;
      uint8_t* row = places + place * kRowBytes + (eight ^ place % 8) * 16;
      uint32_t m[4] = {};
      if constexpr (kAdds) load_transposed(m, row);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Vec<scalar_t, 2> value;
        memcpy(static_cast<void*>(&value), m + i, 4);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float v = acc[8 * pair + 4 * (i / 2) + 2 * (i % 2) + k] + bias.of[i % 2];
          if constexpr (kAdds) v += to_float(value.v[k]);
          value.v[k] = from_float<scalar_t>(relu ? gpu_relu(v) : v);
        }
        memcpy(m + i, static_cast<const void*>(&value), 4);
      }
      store_transposed(row, m);
    }
  }

  __device__ __forceinline__ void keep(const float (&acc)[128]) {
#pragma unroll
    for (int slice = 0; slice < P::kSlices; ++slice) {
      const Bias bias = bias_of(p.bias, 64 * slice);
#pragma unroll
      for (int part = 0; part < P::kColumns * kParts; ++part)
        lay_out<false>(acc + 64 * slice + 16 * part, bias, p.relu, s.middle[number][slice] + part * kPartBytes);
    }
    publish_shared();
    sync_group(number);
  }

  // A part of y or z: once its warps have laid it out, one thread stores it, and gives back the buffer of the one before.
  template <bool kAdds>
  __device__ __forceinline__ void finish_part(const float* acc, const Bias& bias, bool relu, const TileMap& map, int channel) {
    uint8_t* places = s.part[number][buffer.index];
    s.part_full[number][buffer.index].wait(buffer.parity);
    lay_out<kAdds>(acc, bias, relu, places);
    publish_shared();
    sync_group(number);
    if (threadIdx.x % kGroup == 0) {
      const int4 at = s.corner[number][buffer.index];
      store_pixels(map, places, channel, at.x, at.y, at.z);
      commit_stores();
      wait_for_stores_but<1>();
      if (stored >= 0) s.part_empty[number][stored].arrive();
      stored = buffer.index;
    }
  }

  template <int kPart>
  __device__ __forceinline__ void finish_y(const float (&acc)[64], const Bias& bias, int channel, float (&next)[kMiddle]) {
    finish_part<true>(acc + 16 * kPart, bias, p.last_relu, p.y, channel);
    if constexpr (kNext) multiply_part<kPart>(next);
    buffer.next();
  }

  __device__ __forceinline__ void finish_z(const float (&acc)[kMiddle]) {
#pragma unroll
    for (int slice = 0; slice < P::kSlices; ++slice) {
      const Bias bias = bias_of(p.next_bias, 64 * slice);
#pragma unroll
      for (int part = 0; part < kParts; ++part, buffer.next()) {
        finish_part<false>(acc + 64 * slice + 16 * part, bias, p.next_relu, p.z, 64 * slice);
        if (lane == 0) s.part_empty[number][buffer.index].arrive();
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (Tile tile(p); tile; tile.next()) {
      {
        float acc[128];
        clear(acc);
        convolve(acc, tile);
        keep(acc);
      }
      for (int column = 0; column < P::kColumns; ++column) {
        float next[kMiddle];
        if constexpr (kNext) clear(next);
        for (int channel = 0; channel < p.channels_out; channel += 64) {
          float acc[64];
          clear(acc);
          const Bias bias = bias_of(p.last_bias, channel);
          multiply_middle(acc, column);
          finish_y<0>(acc, bias, channel, next);
          finish_y<1>(acc, bias, channel, next);
          finish_y<2>(acc, bias, channel, next);
          finish_y<3>(acc, bias, channel, next);
        }
        if constexpr (kNext) {
          end_products(next);
          finish_z(next);
        }
      }
    }
    if (threadIdx.x % kGroup == 0) wait_for_stores_but<0>();
  }
};

#endif

template <int kMiddle, bool kNext, typename scalar_t>
__global__ void __launch_bounds__(kBlockThreads, 1) sm90_conv_act_conv_act_kernel(const __grid_constant__ Kernel p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  using P = Plan<kMiddle>;
  Shared<kMiddle>& s = shared_memory<Shared<kMiddle>>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < P::kSlices; ++i) s.x_full[i].init(1), s.x_empty[i].init(4 * kGroups);
    for (int i = 0; i < P::kStages; ++i) s.weight_full[i].init(1), s.weight_empty[i].init(4 * kGroups);
    for (int group = 0; group < kGroups; ++group)
      for (int i = 0; i < kBuffers; ++i) s.part_full[group][i].init(1), s.part_empty[group][i].init(kNext ? 5 : 1);
    s.lead.init(1);
    publish_barriers();
    prefetch(p.x), prefetch(p.weight), prefetch(p.last_weight), prefetch(p.residual), prefetch(p.y);
  }
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_begin();

  if (threadIdx.x < kGroups * kGroup) {
    take_registers<kConsumerRegisters>();
    Group<kMiddle, kNext, scalar_t>(p, s).run();
  } else {
    give_up_registers<kProducerRegisters>();
    const int warp = threadIdx.x % kGroup / 32;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) load_images<kMiddle>(p, s);
    if (warp == 1) load_weights<kMiddle, kNext>(p, s);
    if (warp >= 2) load_residuals<kMiddle, kNext>(p, s, warp - 2);
  }
#endif
}

template <int kMiddle, bool kNext, typename scalar_t>
cudaError_t launch_typed(const Kernel& kernel, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kMiddle>);
  const auto entry = sm90_conv_act_conv_act_kernel<kMiddle, kNext, scalar_t>;
  const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(entry),
                                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (status != cudaSuccess) return status;
  const unsigned blocks = static_cast<unsigned>(std::min(kernel.tiles, multiprocessors));
  return launch_behind(entry, dim3(blocks), dim3(kBlockThreads), kernel, kBytes, stream);
}

template <int kMiddle, bool kNext>
cudaError_t launch(const ConvActConvActParams& c, cudaStream_t stream) {
  using P = Plan<kMiddle>;
  const Span &h = c.window.h, &w = c.window.w;
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return cudaErrorInvalidDevice;
  Kernel kernel{};
  kernel.window = c.window;
  kernel.taps = h.kernel * w.kernel;
  kernel.channels_out = c.channels_out;
  kernel.lead = std::min(P::kStages - 2, kernel.taps * P::kSlices - 1);
  kernel.height = c.x.height, kernel.width = c.x.width;
  kernel.rows = c.x.height + h.padding, kernel.columns = c.x.width + w.padding;
  kernel.bias = c.bias, kernel.last_bias = c.last_bias, kernel.next_bias = c.next_bias;
  kernel.relu = c.relu, kernel.last_relu = c.last_relu, kernel.next_relu = c.next_relu;
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
  then(make_tile_map(&kernel.last_weight, c.dtype, c.last_weight, c.channels_out, 1, kMiddle, 64));
  then(make_image_map(&kernel.residual, c.dtype, c.residual, y, window, kPartPlaces));
  then(make_image_map(&kernel.y, c.dtype, c.y, y, window, kPartPlaces));
  if (kNext) {
    then(make_tile_map(&kernel.next_weight, c.dtype, c.next_weight, kMiddle, 1, c.channels_out, kMiddle));
    then(make_image_map(&kernel.z, c.dtype, c.z, c.x, window, kPartPlaces));
  }
  if (status != cudaSuccess) return status;
  return c.dtype == DType::kFloat16 ? launch_typed<kMiddle, kNext, __half>(kernel, multiprocessors, stream)
                                    : launch_typed<kMiddle, kNext, __nv_bfloat16>(kernel, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_sm90_conv_act_conv_act(const ConvActConvActParams& params, cudaStream_t stream) {
  const bool next = params.next_weight != nullptr;
  if (params.channels_out % 64 != 0) return cudaErrorInvalidValue;
  if (params.x.channels == 64) return next ? launch<64, true>(params, stream) : launch<64, false>(params, stream);
  if (params.x.channels == 128) return next ? launch<128, true>(params, stream) : launch<128, false>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace fastres::cuda
