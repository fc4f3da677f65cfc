// Formula: y = act(conv(x, weight) [+ bias]) for few input channels: a row of a window is one run of values in NHWC.
// Layout: a block computes a part of an image, up to 8 rows of 128 pixels, by 64 output channels; it holds the rows of x under
// them, and all weights in the order of fragments, in shared memory; a warp computes 32 pixels at a time, all 64 channels.
// Bytes per output: y once; x once from memory, from L2 for the rows that parts share.
// Accumulate type: float, window rows in order; bias is added in float; one rounding, to y's type.
// Invariants: what lies beyond the image is zero; values beside a run, which its last eighth and an aligning first value take
// along, are cut off in registers: a weight of zero would let their NaN through.
#include "common/epilogue.h"
#include "cuda/conv.h"
#include "cuda/device/conv_rows.cuh"

namespace fastres::cuda {
namespace {

constexpr int kTiles = 2;                     // of 16 pixels, that a warp computes at a time
constexpr int kWarpPixels = 16 * kTiles;
constexpr int kColumns = kConvChannels / 8;   // of 8 output channels
constexpr int kStepBytes = 32 * kConvChannels;  // of the packed weight, for 16 values
constexpr int kMostRows = 8;                  // of a part
constexpr int64_t kStagedBytes = 32 << 10;    // four blocks' fit the shared memory of a Hopper multiprocessor
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
constexpr int kResident = 4;  // blocks of a multiprocessor
#else
constexpr int kResident = 3;  // as many as its shared memory holds
#endif
constexpr int64_t kEnoughParts = 264;         // smaller parts where there are fewer: two for each multiprocessor

struct Kernel {
  WindowParts parts;
  int steps;           // of 16 values
  int channel_blocks;  // of 64 output channels
  int channels_out;
  bool relu;
  const void* x;
  const uint4* packed;
  const float* bias;
  void* y;
};

// Column of a fragment's accumulators to output channel: a lane's pairs are 8 channels that lie side by side, and the four
// lanes of a pixel write 64 bytes at a time.
FASTRES_HD int channel_of(int tile, int column) { return 32 * (tile / 4) + 8 * (column / 2) + 2 * (tile % 4) + column % 2; }

struct Pack {
  int window_rows, values, lead, eighths, steps, channels_out;
  int64_t size;
  const uint16_t* weight;
  uint16_t* packed;
};

// Lane by lane what it reads at once: of each 16 values and 16 channels, two tiles by two eighths by two values.
__global__ void __launch_bounds__(kThreads) conv_rows_pack_kernel(const Pack p) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= p.size) return;
  const int pair = static_cast<int>(i % 2), part = static_cast<int>(i / 2 % 4), lane = static_cast<int>(i / 8 % 32);
  const int tile = static_cast<int>(i / 256 % 4) * 2 + part / 2;
  const int eighth = static_cast<int>(i / 1024 % p.steps) * 2 + part % 2;
  const int64_t channel = i / 1024 / p.steps * kConvChannels + channel_of(tile, lane / 4);
  const int row = eighth / p.eighths, value = eighth % p.eighths * 8 + lane % 4 * 2 + pair - p.lead;
  const bool inside = row < p.window_rows && value >= 0 && value < p.values && channel < p.channels_out;
  p.packed[i] = inside ? p.weight[(channel * p.window_rows + row) * p.values + value] : uint16_t{0};
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// A lane's bits of the first and the last eighth of a run that belong to it.
struct Cut {
  uint32_t first, last;

  __device__ Cut(const WindowParts& p, int eighths) {
    const int t = threadIdx.x % 4, left = p.lead + p.values - 8 * (eighths - 1) - 2 * t;
    first = t == 0 && p.lead ? 0xffff0000u : ~0u;
    last = left >= 2 ? ~0u : left == 1 ? 0x0000ffffu : 0u;
  }
};

using Accumulators = float[kTiles][kColumns][4];

// Adds the products of kRows rows of windows. offsets: of this lane's pixels, g and g + 8 of each tile.
template <typename scalar_t, int kEighths, bool kEven, int kRows>
__device__ __forceinline__ void add_rows(Accumulators& acc, const scalar_t* staged, int pitch,
                                         const int (&offsets)[kTiles][2], const Cut& cut, const uint4* packed) {
  constexpr int kCount = kRows * kEighths;
#pragma unroll
  for (int step = 0; step < (kCount + 1) / 2; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int eighth = 2 * step + part;
      if (eighth >= kCount) continue;
      const scalar_t* row = staged + eighth / kEighths * pitch + eighth % kEighths * 8;
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        uint32_t two = load_two<kEven>(row + offsets[i / 2][i % 2]);
        if (eighth % kEighths == 0) two &= cut.first;
        if (eighth % kEighths == kEighths - 1) two &= cut.last;
        a[i / 2][2 * part + i % 2] = two;
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; column += 2) {
      const uint4 b = packed[(step * kColumns + column) * 16];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (2 * step + 1 < kCount) {
          warp_product<scalar_t>(acc[tile][column], a[tile], b.x, b.y);
          warp_product<scalar_t>(acc[tile][column + 1], a[tile], b.z, b.w);
        } else {
          warp_product<scalar_t>(acc[tile][column], a[tile][0], a[tile][1], b.x);
          warp_product<scalar_t>(acc[tile][column + 1], a[tile][0], a[tile][1], b.z);
        }
      }
    }
  }
}

// Adds the bias, applies the ReLU, rounds and stores: of a pixel each lane has 8 channels, twice.
template <typename scalar_t>
__device__ __forceinline__ void finish(const Kernel& p, const Part& part, int first_pixel, int first_channel,
                                       const float* bias, const Accumulators& acc) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int pixel = first_pixel + 8 * i + g;
    if (pixel >= part.pixels()) continue;
    scalar_t* y = static_cast<scalar_t*>(p.y) + part.output(p.parts, pixel) * p.channels_out + first_channel;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int channel = 32 * half + 8 * t;
      if (first_channel + channel >= p.channels_out) continue;
      float out[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const float v = acc[i / 2][4 * half + k / 2][2 * (i % 2) + k % 2] + bias[channel + k];
        out[k] = p.relu ? gpu_relu(v) : v;
      }
      store(y + channel, out);
    }
  }
}

#endif  // sm_80

template <typename scalar_t, int kEighths, bool kEven>
__global__ void __launch_bounds__(kConvThreads, kResident) conv_rows_kernel(const __grid_constant__ Kernel p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  uint8_t* memory = dynamic_memory();
  auto* packed = reinterpret_cast<uint4*>(memory);
  auto* bias = reinterpret_cast<float*>(memory + p.steps * kStepBytes);
  auto* staged = reinterpret_cast<scalar_t*>(bias + kConvChannels);
  auto* offsets = reinterpret_cast<int*>(staged + p.parts.staged_rows * p.parts.pitch);
  const Part part(p.parts, blockIdx.x / p.channel_blocks);
  const int channel_block = static_cast<int>(blockIdx.x % p.channel_blocks), first_channel = channel_block * kConvChannels;

  stage_rows(p.parts, part, p.x, staged);
  const int vectors = p.steps * kStepBytes / 16;
  for (int i = threadIdx.x; i < vectors; i += kConvThreads)
    copy_16_bytes(packed + i, p.packed + channel_block * vectors + i, true);
  commit_copies();
  tabulate<kWarpPixels>(p.parts, part, offsets);
  for (int i = threadIdx.x; i < kConvChannels; i += kConvThreads)
    bias[i] = p.bias != nullptr && first_channel + i < p.channels_out ? p.bias[first_channel + i] : 0.0f;
  wait_for_copies<0>();
  __syncthreads();

  const Cut cut(p.parts, kEighths);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, pitch = p.parts.pitch, window_rows = p.parts.window.h.kernel;
  for (int first = threadIdx.x / 32 * kWarpPixels; first < part.pixels(); first += kConvWarps * kWarpPixels) {
    int own[kTiles][2];
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) own[i / 2][i % 2] = offsets[first + 8 * i + g] + 2 * t;
    float acc[kTiles][kColumns][4] = {};
    const scalar_t* rows = staged;
    const uint4* weights = packed + threadIdx.x % 32;
    int row = 0;
#pragma unroll 1
    for (; row + 1 < window_rows; row += 2) {  // two rows make whole steps of either number of eighths
      add_rows<scalar_t, kEighths, kEven, 2>(acc, rows, pitch, own, cut, weights);
      rows += 2 * pitch;
      weights += kEighths * (kStepBytes / 16);
    }
    if (row < window_rows) add_rows<scalar_t, kEighths, kEven, 1>(acc, rows, pitch, own, cut, weights);
    finish<scalar_t>(p, part, first, first_channel, bias, acc);
  }
#endif
}

}  // namespace

cudaError_t launch_conv_rows_pack(const ConvRowsPackParams& params, cudaStream_t stream) {
  const WindowRows run(params.channels, params.w);
  const int64_t size = conv_rows_packed(run, params.window_rows, params.channels_out);
  const Pack pack{params.window_rows, run.values, run.lead, run.eighths(), conv_rows_steps(run, params.window_rows),
                  params.channels_out, size, static_cast<const uint16_t*>(params.weight), static_cast<uint16_t*>(params.packed)};
  const int64_t blocks = ceil_div(size, kThreads);
  if (!run.fits() || blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(conv_rows_pack_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), pack, stream);
}

cudaError_t launch_conv_rows(const ConvRowsParams& params, cudaStream_t stream) {
  const ConvRowsParams& c = params;
  Kernel kernel{window_parts(c.x, c.window, kMostRows, kStagedBytes, kEnoughParts)};
  kernel.steps = conv_rows_steps(WindowRows(c.x.channels, c.window.w), c.window.h.kernel);
  kernel.channel_blocks = static_cast<int>(ceil_div(c.channels_out, kConvChannels));
  kernel.channels_out = c.channels_out;
  kernel.relu = c.relu;
  kernel.x = c.x_data;
  kernel.packed = static_cast<const uint4*>(c.packed);
  kernel.bias = c.bias;
  kernel.y = c.y;
  const int bytes = kernel.steps * kStepBytes + 4 * kConvChannels + kernel.parts.staged_bytes() +
                    4 * table_size(kernel.parts, kWarpPixels);
  return with_window_traits(c.dtype, kernel.parts, [&](auto scalar, auto eighths, auto even) {
    const auto entry = conv_rows_kernel<decltype(scalar), decltype(eighths)::value, decltype(even)::value>;
    return launch_with_memory(entry, kernel.parts.count() * kernel.channel_blocks, kernel, bytes, stream);
  });
}

}  // namespace fastres::cuda
