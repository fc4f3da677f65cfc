// What the kernels of conv share: parts of the output, the rows of x under one in shared memory, and windows in them.
#pragma once

#include "cuda/conv.h"
#include "cuda/device/mma.cuh"
#include "cuda/device/vec.cuh"

namespace fastres::cuda {

constexpr int kConvThreads = 128;
constexpr int kConvWarps = kConvThreads / 32;
constexpr int kMostColumns = 128;  // of a part

inline int in_eights(int values) { return (values + 7) / 8 * 8; }

// Parts of at most `rows` rows whose rows of x take at most `bytes`; smaller ones where there would be few.
inline WindowParts window_parts(const Images& x, const Window& window, int rows, int64_t bytes, int64_t enough) {
  const WindowRows run(x.channels, window.w);
  WindowParts p{};
  p.x = x;
  p.window = window;
  p.out_height = window.h.out(x.height);
  p.out_width = window.w.out(x.width);
  p.values = run.values;
  p.lead = run.lead;
  p.eighths = run.eighths();
  p.step = window.w.stride * x.channels;
  const int ahead = window.w.padding * x.channels;
  p.before = in_eights(ahead);
  p.first = p.before - ahead - p.lead;
  p.vectors = int64_t{x.width} * x.channels % 8 == 0;
  p.rows = p.out_height < rows ? p.out_height : rows;
  p.column_parts = static_cast<int>(ceil_div(p.out_width, kMostColumns));
  p.columns = p.column_parts == 1 ? p.out_width : in_eights(static_cast<int>(ceil_div(p.out_width, p.column_parts)));
  while (true) {
    p.pitch = in_eights(p.first + (p.columns - 1) * p.step + 8 * p.eighths);
    p.staged_rows = (p.rows - 1) * window.h.stride + window.h.kernel;
    p.row_parts = static_cast<int>(ceil_div(p.out_height, p.rows));
    p.column_parts = static_cast<int>(ceil_div(p.out_width, p.columns));
    const bool fits = p.staged_bytes() <= bytes;
    if (p.rows > 1 && (!fits || p.count() < enough)) p.rows = (p.rows + 1) / 2;
    else if (p.columns > 8 && !fits) p.columns = in_eights(p.columns / 2);
    else return p;
  }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// One part: its first output pixel, its size, and where its rows of x begin.
struct Part {
  int image, row, column;
  int rows, columns;

  __device__ Part(const WindowParts& p, int64_t number) {
    const int64_t line = number / p.column_parts;
    column = static_cast<int>(number % p.column_parts) * p.columns;
    row = static_cast<int>(line % p.row_parts) * p.rows;
    image = static_cast<int>(line / p.row_parts);
    rows = p.out_height - row < p.rows ? p.out_height - row : p.rows;
    columns = p.out_width - column < p.columns ? p.out_width - column : p.columns;
  }
  __device__ int pixels() const { return rows * columns; }

  // Of the part's pixel in the output of all images.
  __device__ int64_t output(const WindowParts& p, int pixel) const {
    const int64_t first = (int64_t{image} * p.out_height + row) * p.out_width + column;
    return first + (p.column_parts == 1 ? pixel : int64_t{pixel / columns} * p.out_width + pixel % columns);
  }
};

// Copies the rows of x under a part, a warp a row, with zeros for what lies beyond the image; to be waited for.
template <typename scalar_t>
__device__ __forceinline__ void stage_rows(const WindowParts& p, const Part& part, const void* x_data, scalar_t* staged) {
  const int values = p.x.width * p.x.channels, from = part.column * p.step - p.before;
  const int staged_rows = (part.rows - 1) * p.window.h.stride + p.window.h.kernel;
  for (int r = threadIdx.x / 32; r < staged_rows; r += kConvWarps) {
    const int y = part.row * p.window.h.stride - p.window.h.padding + r;
    const bool inside = y >= 0 && y < p.x.height;
    const scalar_t* x = static_cast<const scalar_t*>(x_data) + (int64_t{part.image} * p.x.height + (inside ? y : 0)) * values;
    for (int i = threadIdx.x % 32 * 8; i < p.pitch; i += 32 * 8) {
      scalar_t* to = staged + r * p.pitch + i;
      const int at = from + i;
      if (p.vectors) {
        const bool read = inside && at >= 0 && at < values;
        copy_16_bytes(to, read ? x + at : x, read);
      } else {
        Vec<scalar_t, 8> run;
#pragma unroll
        for (int k = 0; k < 8; ++k)
          run.v[k] = inside && at + k >= 0 && at + k < values ? x[at + k] : from_float<scalar_t>(0.0f);
        uint4 bits;
        memcpy(&bits, static_cast<const void*>(run.v), 16);
        *reinterpret_cast<uint4*>(to) = bits;
      }
    }
  }
}

// Where each pixel's first window row begins among the staged values, up to a multiple of kMultiple; pixels beyond the part
// share the first one's.
template <int kMultiple>
__device__ __forceinline__ void tabulate(const WindowParts& p, const Part& part, int* offsets) {
  const int pixels = part.pixels();
  for (int i = threadIdx.x; i < (pixels + kMultiple - 1) / kMultiple * kMultiple; i += kConvThreads) {
    const int pixel = i < pixels ? i : 0;
    offsets[i] = p.first + pixel / part.columns * p.window.h.stride * p.pitch + pixel % part.columns * p.step;
  }
}

inline int table_size(const WindowParts& p, int multiple) { return (p.pixels() + multiple - 1) / multiple * multiple; }

// Two values in a register. kEven: they begin at an even offset.
template <bool kEven, typename scalar_t>
__device__ __forceinline__ uint32_t load_two(const scalar_t* p) {
  if constexpr (kEven) return *reinterpret_cast<const uint32_t*>(p);
  const auto* bits = reinterpret_cast<const uint16_t*>(p);
  return bits[0] | uint32_t{bits[1]} << 16;
}

#endif  // sm_80

// Calls f(scalar_t{}, eighths, whether windows begin at even offsets), the last two as integral constants.
template <typename F>
cudaError_t with_window_traits(DType dtype, const WindowParts& p, F f) {
  const auto typed = [&](auto scalar, auto eighths) {
    return p.step % 2 == 0 ? f(scalar, eighths, std::true_type{}) : f(scalar, eighths, std::false_type{});
  };
  const auto counted = [&](auto scalar) {
    return p.eighths == 2 ? typed(scalar, std::integral_constant<int, 2>{}) : typed(scalar, std::integral_constant<int, 3>{});
  };
  if (p.eighths < 2 || p.eighths > 3) return cudaErrorInvalidValue;
  return dtype == DType::kFloat16 ? counted(__half{}) : counted(__nv_bfloat16{});
}

// Launches with dynamic shared memory.
template <typename Params>
cudaError_t launch_with_memory(void (*kernel)(Params), int64_t blocks, Params params, int bytes, cudaStream_t stream) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const void* function = reinterpret_cast<const void*>(kernel);
  const cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  void* arguments[] = {&params};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kConvThreads), arguments, bytes, stream);
}

}  // namespace fastres::cuda
