// Formula: y = max over 3x3 windows, stride 2, padding 1, of relu(conv(x, weight) + bias), for few input channels.
// Layout: a block pools a strip of an image, 64 channels. A warp computes 16 columns of two rows of the convolution at a time,
// from the bottom of the strip up, and keeps maxima of rows in registers; a lane has 16 channels of each of its pixels.
// Bytes per output: y once; x once, from L2 for the rows that strips share; what is pooled never leaves the multiprocessor.
// Accumulate type: float, the bias first, then window rows in order; rounded to y's type before it is compared.
// Invariants: a NaN wins; zero stands for the padding and the ReLU at once: no window is without a pixel of the image.
#include "cuda/conv_bn_act_maxpool.h"
#include "cuda/device/conv_rows.cuh"
#include "cuda/device/lanes.cuh"

namespace fastres::cuda {
namespace {

constexpr int kPoolThreads = 2 * kConvThreads;
constexpr int kPoolWarps = kPoolThreads / 32;
constexpr int kResident = 2;                  // blocks of a multiprocessor
constexpr int kReserved = 1 << 10;            // of shared memory, for each block
constexpr int kTiles = 2;                     // of 8 columns, that a warp computes at a time
constexpr int kUnitColumns = 8 * kTiles;
constexpr int kHaloColumns = 8;               // left of a part, of which one is needed: copies stay aligned
constexpr int kColumns = kConvChannels / 8;   // of 8 output channels
constexpr int kStepBytes = 32 * kConvChannels;  // of the packed weight, for 16 values
constexpr int kTableBytes = 4 * kConvChannels + 64;  // the bias, and where the strip lies
constexpr int kMostPooledRows = 8;            // of a strip: a stem's takes half of a Hopper multiprocessor's shared memory
constexpr int kVectors = kConvChannels / 8;   // of 16 bytes, of a pixel
constexpr int kEdgeVectors = 2 * kVectors;    // of a unit's row: its first window so far, its last column
constexpr int kHandedVectors = 32 * 2 * kTiles;  // of a unit's lower row

struct Kernel {
  WindowParts parts;   // of the convolution's output, whole windows of the pool
  int steps;           // of 16 values
  int channel_blocks;  // of 64 output channels
  int channels_out;
  int height, width;   // of y
  const void* x;
  const uint4* packed;
  const float* bias;
  void* y;

  int halo() const { return parts.column_parts > 1 ? kHaloColumns : 0; }
  int units() const { return static_cast<int>(ceil_div(parts.columns + halo(), kUnitColumns)); }
  int bytes() const {
    const int vectors = units() * parts.rows / 2 * kEdgeVectors + kPoolWarps * kHandedVectors;
    return steps * kStepBytes + kTableBytes + parts.staged_bytes() + 16 * vectors;
  }
};

// Strips of whole windows, as high as fit, lower ones where there would be few; narrower ones where no low one fits.
void divide(Kernel& k, const ConvRowsParams& c, int64_t bytes, int64_t enough) {
  WindowParts& p = k.parts;
  p = window_parts(c.x, c.window, 1, INT32_MAX, 0);
  const int rows = pooled(p.out_height);
  p.rows = 2 * static_cast<int>(ceil_div(rows, ceil_div(rows, kMostPooledRows)));
  while (true) {
    p.row_parts = static_cast<int>(ceil_div(p.out_height, p.rows));
    p.column_parts = static_cast<int>(ceil_div(p.out_width, p.columns));
    p.pitch = in_eights(p.first + (p.columns + k.halo() - 1) * p.step + 8 * p.eighths);
    p.staged_rows = p.rows * p.window.h.stride + p.window.h.kernel;
    const bool fits = k.bytes() <= bytes;
    if (p.rows > 2 && (!fits || p.count() * k.channel_blocks < enough)) p.rows = (p.rows / 2 + 1) / 2 * 2;
    else if (p.columns > 8 && !fits) p.columns = in_eights(p.columns / 2);
    else return;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// Which of a lane's values of the first and the last eighth of a run belong to it: whether one ahead does not, and bits.
struct Cut {
  bool ahead;
  uint32_t last;

  __device__ Cut(const WindowParts& p, int eighths, int t) {
    const int left = p.lead + p.values - 8 * (eighths - 1) - 2 * t;
    ahead = t == 0 && p.lead;
    last = left >= 2 ? ~0u : left == 1 ? 0x0000ffffu : 0u;
  }
};

// 8 values, always two in a register: as elements of their own they would take twice as many.
struct alignas(16) Eight {
  uint32_t words[4];
};

// A part with a row above it and columns left of it, where there are, and where it lies in y.
struct Strip : Part {
  int above, halo;              // 0 or 1 row, 0 or kHaloColumns
  int first_row, first_column;  // of y, the latter of the halo's first window
  int pooled_rows, units;
  int first_channel;
  int nothing = 0;  // as no compiler knows

  __device__ explicit Strip(const Kernel& p)
      : Part(p.parts, blockIdx.x / p.channel_blocks), first_channel(blockIdx.x % p.channel_blocks * kConvChannels) {
    above = row > 0;
    halo = column > 0 ? kHaloColumns : 0;
    first_row = row / 2;
    pooled_rows = (rows + 1) / 2;
    row -= above;
    rows += above;
    column -= halo;
    columns += halo;
    first_column = column / 2;
    units = (columns + kUnitColumns - 1) / kUnitColumns;
  }
};

// The number of this thread, made anew each time: what follows from it need not be kept in registers meanwhile.
__device__ __forceinline__ int thread_now(const volatile Strip& strip) { return static_cast<int>(threadIdx.x) + strip.nothing; }

// What all lanes of a block read of shared memory.
template <typename scalar_t>
struct Shared {
  uint4* packed;
  float* bias;
  scalar_t* staged;
  Strip* strip;
  Eight* edges;   // of each row of each unit, see kEdgeVectors
  Eight* handed;  // by each warp, see kHandedVectors

  __device__ explicit Shared(const Kernel& p) {
    uint8_t* memory = dynamic_memory();
    packed = reinterpret_cast<uint4*>(memory);
    bias = reinterpret_cast<float*>(memory + p.steps * kStepBytes);
    strip = reinterpret_cast<Strip*>(bias + kConvChannels);
    staged = reinterpret_cast<scalar_t*>(memory + p.steps * kStepBytes + kTableBytes);
    handed = reinterpret_cast<Eight*>(staged + p.parts.staged_rows * p.parts.pitch);
    edges = handed + kPoolWarps * kHandedVectors;
  }

  // The first of this thread's.
  __device__ Eight* handed_by(int thread) const { return handed + at().nothing + thread / 32 * kHandedVectors + thread % 32; }

  // Read anew each time, as is the bias: kept over a row's products, they would take registers that are not there.
  __device__ const volatile Strip& at() const { return *strip; }
};

// The warp's share of all rows of windows, unit by unit; none where last is before first.
struct Share {
  int first, last;

  __device__ explicit Share(const volatile Strip& strip) {
    const int warp = thread_now(strip) / 32, items = strip.units * strip.pooled_rows, more = items % kPoolWarps;
    first = warp * (items / kPoolWarps) + (warp < more ? warp : more);
    last = first + items / kPoolWarps - (warp < more ? 0 : 1);
  }
};

// Where the window of this lane's pixel begins among the staged values, in a tile of a unit; beyond the strip that of its last
// column, which a pool's window there holds anyway.
__device__ __forceinline__ int window_at(const WindowParts& p, const volatile Strip& strip, int unit, int tile, int row) {
  const int lane = thread_now(strip) % 32, column = unit * kUnitColumns + 8 * tile + lane / 4, end = strip.columns - 1;
  return settled(p.first + 2 * (lane % 4) + (column < end ? column : end) * p.step + row * p.window.h.stride * p.pitch);
}

// Adds the products of kRows rows of windows. at: where they begin, of this lane's pixels g and g + 8 of each tile; moved on.
template <typename scalar_t, int kEighths, bool kEven, int kRows, int kCount>
__device__ __forceinline__ void add_rows(float (&acc)[kCount][kColumns][4], const scalar_t* staged, int pitch,
                                         int (&at)[kCount][2], const Cut& cut, const uint4* packed) {
  constexpr int kRuns = kRows * kEighths;
#pragma unroll
  for (int step = 0; step < (kRuns + 1) / 2; ++step) {
    uint32_t a[kCount][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int eighth = 2 * step + part, in_row = eighth % kEighths;
      if (eighth >= kRuns) continue;
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        uint32_t two = load_two<kEven>(staged + at[i / 2][i % 2] + 8 * in_row);
        if (in_row == 0 && cut.ahead) two &= 0xffff0000u;
        if (in_row == kEighths - 1) {
          two &= cut.last;
          at[i / 2][i % 2] = settled(at[i / 2][i % 2] + pitch);
        }
        a[i / 2][2 * part + i % 2] = two;
      }
    }
#pragma unroll
    for (int column = 0; column < kColumns; column += 2) {
      const uint4 b = packed[(step * kColumns + column) * 16];
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        if (2 * step + 1 < kRuns) {
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

// The convolution with its bias at this lane's pixels, kCount tiles of two each.
template <typename scalar_t, int kEighths, bool kEven, int kCount>
__device__ __forceinline__ void convolve(float (&acc)[kCount][kColumns][4], const Kernel& p, const Shared<scalar_t>& s,
                                         int (&at)[kCount][2]) {
  const int pitch = p.parts.pitch, window_rows = p.parts.window.h.kernel, lane = thread_now(s.at()) % 32;
  const volatile float* bias = s.bias + 8 * (lane % 4);
#pragma unroll
  for (int i = 0; i < kColumns * 2; ++i) {
    const int column = i / 2;
    const float value = bias[32 * (column / 4) + 2 * (column % 4) + i % 2];
#pragma unroll
    for (int tile = 0; tile < kCount; ++tile) acc[tile][column][i % 2] = acc[tile][column][2 + i % 2] = value;
  }
  const Cut cut(p.parts, kEighths, lane % 4);
  const uint4* weights = s.packed + lane;
  int row = 0;
#pragma unroll 1
  for (; row + 1 < window_rows; row += 2) {  // two rows make whole steps of either number of eighths
    add_rows<scalar_t, kEighths, kEven, 2>(acc, s.staged, pitch, at, cut, weights);
    weights += kEighths * (kStepBytes / 16);
  }
  if (row < window_rows) add_rows<scalar_t, kEighths, kEven, 1>(acc, s.staged, pitch, at, cut, weights);
}

// 16 channels of this lane at a pixel of each tile: 8 from 8 t, 8 from 32 + 8 t.
using Values = Eight[kTiles][2];

// Half of one pixel of a tile, rounded.
template <typename scalar_t>
__device__ __forceinline__ Eight finished(const float (&acc)[kColumns][4], int pixel, int half) {
  Eight out;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float(&from)[4] = acc[4 * half + k];
    if constexpr (std::is_same_v<scalar_t, __half>) {
      const __half2 pair = __floats2half2_rn(from[2 * pixel], from[2 * pixel + 1]);
      memcpy(out.words + k, &pair, 4);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[2 * pixel], from[2 * pixel + 1]);
      memcpy(out.words + k, &pair, 4);
    }
  }
  return out;
}

// The larger value of each pair; a NaN wins.
template <typename scalar_t>
__device__ __forceinline__ Eight larger(const Eight& a, const Eight& b) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Vec<scalar_t, 2> values[2];
    memcpy(static_cast<void*>(values), a.words + i, 4);
    memcpy(static_cast<void*>(values + 1), b.words + i, 4);
    values[0] = maximum(values[0], values[1]);
    memcpy(out.words + i, static_cast<const void*>(values), 4);
  }
  return out;
}

// By value: a reference to one of two would have an address, which registers have not.
__device__ __forceinline__ Eight either(bool first, const Eight& a, const Eight& b) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = first ? a.words[i] : b.words[i];
  return out;
}

__device__ __forceinline__ Eight from_lane(const Eight& own, int lane) {
  Eight out;
#pragma unroll
  for (int i = 0; i < 4; ++i) out.words[i] = fastres::cuda::from_lane(own.words[i], lane);
  return out;
}

// Stores 8 channels of one pixel of y, unless they are another part's or beyond the last one.
template <typename scalar_t>
__device__ __forceinline__ void put(const Kernel& p, const volatile Strip& strip, int row, int window, int channel,
                                    const Eight& out) {
  channel += strip.first_channel;
  if (2 * window < strip.halo || 2 * window >= strip.columns || channel >= p.channels_out) return;
  const int64_t line = int64_t{strip.image} * p.height + strip.first_row + row;
  auto* y = static_cast<scalar_t*>(p.y) + (line * p.width + strip.first_column + window) * p.channels_out + channel;
  *reinterpret_cast<Eight*>(y) = out;
}

// The maxima of a row of windows, of which `best` holds those of each column: the even lanes of a pair of columns take the
// first half of the channels, the odd ones the other. The unit's first window lacks the column that another unit has: it waits
// with the unit's own last one.
template <typename scalar_t>
__device__ __forceinline__ void pool_row(const Kernel& p, const Shared<scalar_t>& s, int unit, int row, Values& best) {
  const volatile Strip& strip = s.at();
  const int lane = thread_now(strip) % 32, g = lane / 4, t = lane % 4, odd = g % 2;
  Eight* edge = s.edges + strip.nothing + (unit * strip.pooled_rows + row) * kEdgeVectors;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    auto& value = best[i / 2][i % 2];
    value = larger<scalar_t>(value, Eight{});
  }
  const int left = (g - odd + 7) % 8 * 4 + t;  // a lane of the column before the pair, in this tile or the one before
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    Eight own = either(odd, best[tile][1], best[tile][0]);
    own = larger<scalar_t>(own, from_lane(either(odd, best[tile][0], best[tile][1]), lane ^ 4));
    const int before = tile > 0 ? tile - 1 : 0;
    const Eight low = from_lane(either(g == 7, best[before][0], best[tile][0]), left);
    const Eight high = from_lane(either(g == 7, best[before][1], best[tile][1]), left);
    if (tile == 0 && g < 2) {
      edge[4 * odd + t] = own;
      continue;
    }
    own = larger<scalar_t>(own, either(odd, high, low));
    const int window = unit * kUnitColumns / 2 + 4 * tile + g / 2;
    put<scalar_t>(p, strip, row, window, 32 * odd + 8 * t, own);
  }
  if (g == 7) {
    edge[kVectors + t] = best[kTiles - 1][0];
    edge[kVectors + 4 + t] = best[kTiles - 1][1];
  }
}

// The first windows of all units, with the column that they lack.
template <typename scalar_t>
__device__ __forceinline__ void pool_edges(const Kernel& p, const Shared<scalar_t>& s) {
  const volatile Strip& strip = s.at();
  for (int i = thread_now(strip); i < strip.units * strip.pooled_rows * kVectors; i += kPoolThreads) {
    const int item = i / kVectors, vector = i % kVectors, unit = item / strip.pooled_rows;
    Eight out = *(s.edges + item * kEdgeVectors + vector);
    if (unit > 0)
      out = larger<scalar_t>(out, s.edges[(item - strip.pooled_rows) * kEdgeVectors + kVectors + vector]);
    put<scalar_t>(p, strip, item % strip.pooled_rows, unit * kUnitColumns / 2, 8 * vector, out);
  }
}

#endif  // sm_80

template <typename scalar_t, int kEighths, bool kEven>
__global__ void __launch_bounds__(kPoolThreads, kResident) conv_rows_maxpool_kernel(const __grid_constant__ Kernel p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const Shared<scalar_t> s(p);
  const Strip own(p);
  if (threadIdx.x < kConvThreads) {
    stage_rows(p.parts, own, p.x, s.staged);
  } else {
    const int vectors = p.steps * kStepBytes / 16;
    const uint4* packed = p.packed + own.first_channel / kConvChannels * vectors;
    for (int i = threadIdx.x - kConvThreads; i < vectors; i += kConvThreads) copy_16_bytes(s.packed + i, packed + i, true);
  }
  commit_copies();
  for (int i = threadIdx.x; i < kConvChannels; i += kPoolThreads) {
    const int channel = own.first_channel + i;
    s.bias[i] = p.bias != nullptr && channel < p.channels_out ? p.bias[channel] : 0.0f;
  }
  if (threadIdx.x == 0) *s.strip = own;
  wait_for_copies<0>();
  __syncthreads();

  // From the last row of the warp's share to the first: what a row lacks is the lower row of the one before.
  const volatile Strip& strip = s.at();
  Values best;
#pragma unroll 1
  for (int item = Share(strip).last; item >= Share(strip).first; --item) {
    int at[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int rows = strip.pooled_rows, unit = item / rows;
      at[i][0] = window_at(p.parts, strip, unit, i, 2 * (item - unit * rows) + strip.above);
      at[i][1] = at[i][0] + p.parts.window.h.stride * p.parts.pitch;
    }
    float acc[kTiles][kColumns][4];
    convolve<scalar_t, kEighths, kEven, kTiles>(acc, p, s, at);

    const int rows = strip.pooled_rows, unit = item / rows, row = item - unit * rows;
    const bool has_lower = 2 * row + 1 + strip.above < strip.rows;  // else what was computed is of nothing
    const bool begins = item == Share(strip).last, waits = !begins && row + 1 < rows;  // best, for the lower row
    Eight* handed = s.handed_by(thread_now(strip));
    Values higher;
#pragma unroll
    for (int k = 0; k < 2 * kTiles; ++k) {
      const Eight low = has_lower ? finished<scalar_t>(acc[k / 2], 1, k % 2) : Eight{};
      higher[k / 2][k % 2] = larger<scalar_t>(finished<scalar_t>(acc[k / 2], 0, k % 2), low);
      if (begins) handed[k * 32] = low;
      if (waits) best[k / 2][k % 2] = larger<scalar_t>(best[k / 2][k % 2], low);
    }
    if (waits) pool_row(p, s, unit, row + 1, best);
#pragma unroll
    for (int k = 0; k < 2 * kTiles; ++k) best[k / 2][k % 2] = higher[k / 2][k % 2];
    if (row > 0) continue;
    if (strip.above) {
      int over[1][2] = {{window_at(p.parts, strip, unit, 0, 0), window_at(p.parts, strip, unit, 1, 0)}};
      float above[1][kColumns][4];
      convolve<scalar_t, kEighths, kEven, 1>(above, p, s, over);
#pragma unroll
      for (int k = 0; k < 2 * kTiles; ++k)
        best[k / 2][k % 2] = larger<scalar_t>(best[k / 2][k % 2], finished<scalar_t>(above[0], k / 2, k % 2));
    }
    pool_row(p, s, item / strip.pooled_rows, 0, best);
  }
  __syncthreads();
  const Share share(strip);
  if (share.first <= share.last && share.first % strip.pooled_rows > 0) {
    const Eight* handed = s.handed_by(thread_now(strip) - 32);
#pragma unroll
    for (int k = 0; k < 2 * kTiles; ++k)
      best[k / 2][k % 2] = larger<scalar_t>(best[k / 2][k % 2], handed[k * 32]);
    pool_row(p, s, share.first / strip.pooled_rows, share.first % strip.pooled_rows, best);
  }
  __syncthreads();
  pool_edges(p, s);
#endif
}

}  // namespace

cudaError_t launch_conv_rows_maxpool(const ConvRowsParams& params, cudaStream_t stream) {
  const ConvRowsParams& c = params;
  int device = 0, count = 0, memory = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (status != cudaSuccess) return status;
  Kernel kernel{};
  kernel.steps = conv_rows_steps(WindowRows(c.x.channels, c.window.w), c.window.h.kernel);
  kernel.channel_blocks = static_cast<int>(ceil_div(c.channels_out, kConvChannels));
  kernel.channels_out = c.channels_out;
  divide(kernel, c, memory / kResident - kReserved, kResident * count);
  kernel.height = pooled(kernel.parts.out_height);
  kernel.width = pooled(kernel.parts.out_width);
  kernel.x = c.x_data;
  kernel.packed = static_cast<const uint4*>(c.packed);
  kernel.bias = c.bias;
  kernel.y = c.y;
  const int64_t blocks = kernel.parts.count() * kernel.channel_blocks;
  if (!c.relu || blocks > INT32_MAX) return cudaErrorInvalidValue;
  return with_window_traits(c.dtype, kernel.parts, [&](auto scalar, auto eighths, auto even) {
    const auto entry = conv_rows_maxpool_kernel<decltype(scalar), decltype(eighths)::value, decltype(even)::value>;
    const void* function = reinterpret_cast<const void*>(entry);
    const int bytes = kernel.bytes();
    const cudaError_t allowed = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (allowed != cudaSuccess) return allowed;
    void* arguments[] = {&kernel};
    return cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(kPoolThreads), arguments, bytes, stream);
  });
}

}  // namespace fastres::cuda
