// conv of few input channels, the stem of a network: forward, with bias and ReLU where asked, and the gradient by the weight.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"
#include "cuda/images.h"
#include "cuda/launch.h"

namespace fastres::cuda {

constexpr int kConvChannels = 64;    // output channels that a block computes
constexpr int kMostWindowRows = 7;   // of a window
constexpr int kMostWindowStride = 8;
constexpr int kMostRowValues = 24;   // of a row of a window, with what aligns it

// In NHWC a row of a window is one run of KW * C values. A block holds rows of x in shared memory, copied as they lie, and
// reads each run in eighths of 16 values, the first at an even offset: `lead` values before the run, 0 or 1.
struct WindowRows {
  int values, lead;

  WindowRows(int channels, const Span& w) : values(w.kernel * channels), lead(w.padding * channels % 2) {}

  int eighths() const { return (lead + values + 7) / 8; }  // 2 or 3
  bool fits() const { return lead + values > 8 && lead + values <= kMostRowValues; }
};

// How the output is cut into parts of rows x columns pixels of an image, and where the rows of x under one lie.
struct WindowParts {
  Images x;
  Window window;
  int out_height, out_width;
  int values, lead, eighths;  // of a window's row, see WindowRows
  int rows, columns;          // of a part; whole rows, or columns in multiples of 8
  int row_parts, column_parts;
  int before;  // a staged row begins so many values, a multiple of 8, before the part's first window's first column
  int first;   // staged value at which the part's first window's row begins, its lead first: even
  int step;    // staged values from one window to the next
  int pitch;   // values of a staged row, a multiple of 8
  int staged_rows;  // of x, under a part
  bool vectors;     // rows of x are aligned to 16 bytes

  int64_t count() const { return int64_t{x.count} * row_parts * column_parts; }
  int pixels() const { return rows * columns; }
  int staged_bytes() const { return 2 * staged_rows * pitch; }
};

struct ConvRowsPackParams {
  Span w;
  int channels, window_rows, channels_out;
  const void* weight;  // [channels_out, window rows, kernel w, channels], 16-bit elements
  void* packed;        // in the order in which lanes read it, see ConvRowsParams
};

// Elements of the packed weight, a block of 64 output channels after the other; steps: of 16 values, two eighths.
inline int conv_rows_steps(const WindowRows& rows, int window_rows) { return (rows.eighths() * window_rows + 1) / 2; }
inline int64_t conv_rows_packed(const WindowRows& rows, int window_rows, int channels_out) {
  return ceil_div(channels_out, kConvChannels) * conv_rows_steps(rows, window_rows) * 16 * kConvChannels;
}

struct ConvRowsParams {
  DType dtype;  // float16 or bfloat16
  bool relu;
  Images x;        // NHWC, aligned to 16 bytes
  Window window;   // dilation 1
  int channels_out;  // a multiple of 8
  const void* x_data;
  const void* packed;
  const float* bias;  // or null
  void* y;
};

struct ConvRowsBackwardParams {
  DType dtype;
  Images x;
  Window window;
  int channels_out;
  const void* grad_y;
  const void* x_data;
  float* partial;  // conv_rows_partials() floats
  void* grad_weight;  // [channels_out, window rows, kernel w, channels]
};

int64_t conv_rows_partials(const ConvRowsBackwardParams& params);

cudaError_t launch_conv_rows_pack(const ConvRowsPackParams& params, cudaStream_t stream);
cudaError_t launch_conv_rows(const ConvRowsParams& params, cudaStream_t stream);
cudaError_t launch_conv_rows_backward(const ConvRowsBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
