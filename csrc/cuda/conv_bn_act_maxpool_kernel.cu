// Formula: y = max over 3x3 windows, stride 2, padding 1, of relu(conv(x, weight) + bias), for few input channels.
// Layout: a block pools a strip of an image, 64 channels. A warp computes 16 columns of two rows of the convolution at a time,
// from the bottom of the strip up, and keeps maxima of rows in registers; a lane has 16 channels of each of its pixels.
// Bytes per output: y once; x once, from L2 for the rows that strips share; what is pooled never leaves the multiprocessor.
// Accumulate type: float, as conv_kernel.cu, bit for bit; the convolution is rounded to y's type before it is compared.
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
constexpr int kMostPooledRows = 8;            // of a strip: a stem's takes half of a Hopper multiprocessor's shared memory
constexpr int kVectors = kConvChannels / 8;   // of 16 bytes, of a pixel
constexpr int kEdgeVectors = 2 * kVectors;    // of a unit's row: its first window so far, its last column
constexpr int kHandedVectors = 32 * 2 * kTiles;  // of a unit's lower row
constexpr int64_t kEnoughParts = 264;         // lower strips where there are fewer: two for each multiprocessor

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
    return steps * kStepBytes + 4 * kConvChannels + parts.staged_bytes() + 16 * vectors;
  }
};

// Strips of whole windows, as high as fit, lower ones where there would be few; narrower ones where no low one fits.
void divide(Kernel& k, const ConvRowsParams& c, int64_t bytes) {
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
    if (p.rows > 2 && (!fits || p.count() * k.channel_blocks < kEnoughParts)) p.rows = (p.rows / 2 + 1) / 2 * 2;
    else if (p.columns > 8 && !fits) p.columns = in_eights(p.columns / 2);
    else return;
  }
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

// What all lanes of a block read of shared memory.
template <typename scalar_t>
struct Shared {
  uint4* packed;
  float* bias;
  scalar_t* staged;
  uint4* edges;   // of each row of each unit, see kEdgeVectors
  uint4* handed;  // by each warp, see kHandedVectors

  __device__ explicit Shared(const Kernel& p) {
    uint8_t* memory = dynamic_memory();
    packed = reinterpret_cast<uint4*>(memory);
    bias = reinterpret_cast<float*>(memory + p.steps * kStepBytes);
    staged = reinterpret_cast<scalar_t*>(bias + kConvChannels);
    handed = reinterpret_cast<uint4*>(staged + p.parts.staged_rows * p.parts.pitch);
    edges = handed + kPoolWarps * kHandedVectors;
  }
};

// A part with a row above it and columns left of it, where there are, and where it lies in y.
struct Strip : Part {
  int above, halo;              // 0 or 1 row, 0 or kHaloColumns
  int first_row, first_column;  // of y, the latter of the halo's first window
  int pooled_rows, units;

  __device__ Strip(const WindowParts& p, int64_t number) : Part(p, number) {
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

  // Whether the windows of a column of y, counted from the halo's first, are this strip's.
  __device__ bool owns(int window) const { return 2 * window >= halo && 2 * window < columns; }
};

// Adds the products of kRows rows of windows. offsets: of this lane's pixels, g and g + 8 of each tile.
template <typename scalar_t, int kEighths, bool kEven, int kRows, int kCount>
__device__ __forceinline__ void add_rows(float (&acc)[kCount][kColumns][4], const scalar_t* staged, int pitch,
                                         const int (&offsets)[kCount][2], const Cut& cut, const uint4* packed) {
  constexpr int kRuns = kRows * kEighths;
#pragma unroll
  for (int step = 0; step < (kRuns + 1) / 2; ++step) {
    uint32_t a[kCount][4];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int eighth = 2 * step + part;
      if (eighth >= kRuns) continue;
      const scalar_t* row = staged + eighth / kEighths * pitch + eighth % kEighths * 8;
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
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

// The convolution at this lane's pixels, kCount tiles of two each.
template <typename scalar_t, int kEighths, bool kEven, int kCount>
__device__ __forceinline__ void convolve(float (&acc)[kCount][kColumns][4], const Kernel& p, const Shared<scalar_t>& s,
                                         const int (&offsets)[kCount][2], const Cut& cut) {
  const int pitch = p.parts.pitch, window_rows = p.parts.window.h.kernel;
  const scalar_t* rows = s.staged;
  const uint4* weights = s.packed + threadIdx.x % 32;
  int row = 0;
#pragma unroll 1
  for (; row + 1 < window_rows; row += 2) {  // two rows make whole steps of either number of eighths
    add_rows<scalar_t, kEighths, kEven, 2>(acc, rows, pitch, offsets, cut, weights);
    rows += 2 * pitch;
    weights += kEighths * (kStepBytes / 16);
  }
  if (row < window_rows) add_rows<scalar_t, kEighths, kEven, 1>(acc, rows, pitch, offsets, cut, weights);
}

// 16 channels of this lane at a pixel of each tile: 8 from 8 t, 8 from 32 + 8 t.
template <typename scalar_t>
using Values = Vec<scalar_t, 8>[kTiles][2];

template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> zeros() {
  Vec<scalar_t, 8> out;
  memset(static_cast<void*>(&out), 0, sizeof(out));
  return out;
}

// With the bias, rounded, of one pixel of a tile.
template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> finished(const float (&acc)[kColumns][4], int pixel, int half, const float* bias) {
  float out[8];
#pragma unroll
  for (int k = 0; k < 8; ++k)
    out[k] = acc[4 * half + k / 2][2 * pixel + k % 2] + bias[32 * half + threadIdx.x % 4 * 8 + k];
  return rounded<scalar_t>(out);
}

// By value, in registers: a reference to one of two would have an address.
template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> either(bool first, Vec<scalar_t, 8> a, const Vec<scalar_t, 8>& b) {
  uint32_t words[2][4];
  memcpy(words[0], static_cast<const void*>(&a), 16);
  memcpy(words[1], static_cast<const void*>(&b), 16);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[0][i] = first ? words[0][i] : words[1][i];
  memcpy(static_cast<void*>(&a), words[0], 16);
  return a;
}

template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> values_from(int lane, Vec<scalar_t, 8> own) {
  uint32_t words[4];
  memcpy(words, static_cast<const void*>(&own), 16);
#pragma unroll
  for (uint32_t& word : words) word = from_lane(word, lane);
  memcpy(static_cast<void*>(&own), words, 16);
  return own;
}

// Of shared memory.
template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t, 8> kept(const uint4* from) {
  const uint4 bits = *from;
  Vec<scalar_t, 8> out;
  memcpy(static_cast<void*>(&out), &bits, 16);
  return out;
}
template <typename scalar_t>
__device__ __forceinline__ void keep(uint4* to, const Vec<scalar_t, 8>& v) {
  uint4 bits;
  memcpy(&bits, static_cast<const void*>(&v), 16);
  *to = bits;
}

// Stores 8 channels of one pixel of y, unless they are another part's or beyond the last one.
template <typename scalar_t>
__device__ __forceinline__ void put(const Kernel& p, const Strip& strip, int row, int window, int channel,
                                    const Vec<scalar_t, 8>& out) {
  if (!strip.owns(window) || channel >= p.channels_out) return;
  const int64_t line = int64_t{strip.image} * p.height + strip.first_row + row;
  store(static_cast<scalar_t*>(p.y) + (line * p.width + strip.first_column + window) * p.channels_out + channel, out);
}

// The maxima of a row of windows, of which `best` holds those of each column: the even lanes of a pair of columns take the
// first half of the channels, the odd ones the other. The unit's first window lacks the column that another unit has: it waits
// with the unit's own last one.
template <typename scalar_t>
__device__ __forceinline__ void pool_row(const Kernel& p, const Strip& strip, const Shared<scalar_t>& s, int unit, int row,
                                         int first_channel, Values<scalar_t>& best) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, odd = g % 2;
  uint4* edge = s.edges + (unit * strip.pooled_rows + row) * kEdgeVectors;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    auto& value = best[i / 2][i % 2];
    const bool inside = unit * kUnitColumns + 8 * (i / 2) + g < strip.columns;
    value = either(inside, maximum(value, zeros<scalar_t>()), zeros<scalar_t>());
  }
  const int left = (g - odd + 7) % 8 * 4 + t;  // a lane of the column before the pair, in this tile or the one before
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    Vec<scalar_t, 8> own = either(odd, best[tile][1], best[tile][0]);
    own = maximum(own, values_from(threadIdx.x % 32 ^ 4, either(odd, best[tile][0], best[tile][1])));
    const int before = tile > 0 ? tile - 1 : 0;
    const Vec<scalar_t, 8> low = values_from(left, either(g == 7, best[before][0], best[tile][0]));
    const Vec<scalar_t, 8> high = values_from(left, either(g == 7, best[before][1], best[tile][1]));
    if (tile == 0 && g < 2) {
      keep(edge + 4 * odd + t, own);
      continue;
    }
    own = maximum(own, either(odd, high, low));
    const int window = unit * kUnitColumns / 2 + 4 * tile + g / 2;
    put(p, strip, row, window, first_channel + 32 * odd + 8 * t, own);
  }
  if (g == 7) {
    keep(edge + kVectors + t, best[kTiles - 1][0]);
    keep(edge + kVectors + 4 + t, best[kTiles - 1][1]);
  }
}

// The first windows of all units, with the column that they lack.
template <typename scalar_t>
__device__ __forceinline__ void pool_edges(const Kernel& p, const Strip& strip, const Shared<scalar_t>& s, int first_channel) {
  for (int i = threadIdx.x; i < strip.units * strip.pooled_rows * kVectors; i += kPoolThreads) {
    const int item = i / kVectors, vector = i % kVectors, unit = item / strip.pooled_rows;
    Vec<scalar_t, 8> out = kept<scalar_t>(s.edges + item * kEdgeVectors + vector);
    if (unit > 0)
      out = maximum(out, kept<scalar_t>(s.edges + (item - strip.pooled_rows) * kEdgeVectors + kVectors + vector));
    put(p, strip, item % strip.pooled_rows, unit * kUnitColumns / 2, first_channel + 8 * vector, out);
  }
}

#endif  // sm_80

template <typename scalar_t, int kEighths, bool kEven>
__global__ void __launch_bounds__(kPoolThreads, kResident) conv_rows_maxpool_kernel(const __grid_constant__ Kernel p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  const Shared<scalar_t> s(p);
  const Strip strip(p.parts, blockIdx.x / p.channel_blocks);
  const int channel_block = static_cast<int>(blockIdx.x % p.channel_blocks), first_channel = channel_block * kConvChannels;
  if (threadIdx.x < kConvThreads) {
    stage_rows(p.parts, strip, p.x, s.staged);
  } else {
    const int vectors = p.steps * kStepBytes / 16;
    for (int i = threadIdx.x - kConvThreads; i < vectors; i += kConvThreads)
      copy_16_bytes(s.packed + i, p.packed + channel_block * vectors + i, true);
  }
  commit_copies();
  for (int i = threadIdx.x; i < kConvChannels; i += kPoolThreads)
    s.bias[i] = p.bias != nullptr && first_channel + i < p.channels_out ? p.bias[first_channel + i] : 0.0f;
  wait_for_copies<0>();
  __syncthreads();

  // A warp's share of all rows of all units, from the last to the first: what a row lacks is the lower row of the one before.
  const Cut cut(p.parts, kEighths);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  const int items = strip.units * strip.pooled_rows, share = items / kPoolWarps, more = items % kPoolWarps;
  const int first = warp * share + (warp < more ? warp : more), last = first + share + (warp < more ? 1 : 0) - 1;
  const int row_step = p.parts.window.h.stride * p.parts.pitch;
  int unit = 0, row = 0;
  Values<scalar_t> best;
#pragma unroll 1
  for (int item = last; item >= first; --item) {
    unit = item / strip.pooled_rows;
    row = item - unit * strip.pooled_rows;
    const int upper = 2 * row + strip.above;
    int offsets[kTiles][2];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {  // beyond the part the last column is looked at again, and the last row
      const int column = unit * kUnitColumns + 8 * i + g;
      const int offset = p.parts.first + 2 * (lane % 4) + (column < strip.columns ? column : strip.columns - 1) * p.parts.step;
      offsets[i][0] = offset + upper * row_step;
      offsets[i][1] = upper + 1 < strip.rows ? offsets[i][0] + row_step : offsets[i][0];
    }
    Values<scalar_t> higher;
    {
      float acc[kTiles][kColumns][4] = {};
      convolve<scalar_t, kEighths, kEven, kTiles>(acc, p, s, offsets, cut);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        const Vec<scalar_t, 8> low = finished<scalar_t>(acc[i / 2], 1, i % 2, s.bias);
        higher[i / 2][i % 2] = maximum(finished<scalar_t>(acc[i / 2], 0, i % 2, s.bias), low);
        if (item == last) keep(s.handed + warp * kHandedVectors + i * 32 + lane, low);
        else best[i / 2][i % 2] = maximum(best[i / 2][i % 2], low);
      }
    }
    if (item != last && row + 1 < strip.pooled_rows) pool_row(p, strip, s, unit, row + 1, first_channel, best);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) best[i / 2][i % 2] = higher[i / 2][i % 2];
    if (row > 0) continue;
    if (strip.above) {
      int over[1][2];
      float acc[1][kColumns][4] = {};
#pragma unroll
      for (int i = 0; i < kTiles; ++i) over[0][i] = offsets[i][0] - row_step;
      convolve<scalar_t, kEighths, kEven, 1>(acc, p, s, over, cut);
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        best[i / 2][i % 2] = maximum(best[i / 2][i % 2], finished<scalar_t>(acc[0], i / 2, i % 2, s.bias));
    }
    pool_row(p, strip, s, unit, 0, first_channel, best);
  }
  __syncthreads();
  if (first <= last && row > 0) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      best[i / 2][i % 2] =
          maximum(best[i / 2][i % 2], kept<scalar_t>(s.handed + (warp - 1) * kHandedVectors + i * 32 + lane));
    pool_row(p, strip, s, unit, row, first_channel, best);
  }
  __syncthreads();
  pool_edges(p, strip, s, first_channel);
#endif
}

}  // namespace

cudaError_t launch_conv_rows_maxpool(const ConvRowsMaxpoolParams& params, cudaStream_t stream) {
  const ConvRowsParams& c = params.conv;
  int device = 0, memory = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (status != cudaSuccess) return status;
  Kernel kernel{};
  kernel.steps = conv_rows_steps(WindowRows(c.x.channels, c.window.w), c.window.h.kernel);
  kernel.channel_blocks = static_cast<int>(ceil_div(c.channels_out, kConvChannels));
  kernel.channels_out = c.channels_out;
  divide(kernel, c, memory / kResident - kReserved);
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
