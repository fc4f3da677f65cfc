// The kernels of a plan's steps on 8-bit integers, but for the convolution; each value is (real / scale) + zero point. And
// the one that converts images.
#pragma once

#include <atomic>

#include "common/types.h"
#include "cpu/level.h"

namespace fastres::cpu {

// Images of float32 with padding and further channels of zero written out: as uint8, value * scale + zero
// rounded and held within 0..255, or as bfloat16. Steps of x in elements.
struct ImageArgs {
  bool quantized;
  const float* x;
  void* y;  // images, height + 2 pad_h, width + 2 pad_w, out_channels
  int64_t images, channels, height, width, image_step, channel_step, row_step, pixel_step, out_channels, pad_h, pad_w;
  float scale, zero;
  std::atomic<bool>* finite;  // made false where a value that is quantised is not
};

// Of pixels of `channels`, all uint8: the largest of each window, or their sum / count * scale + zero.
struct PoolInt8Args {
  const uint8_t* x;
  uint8_t* y;
  int64_t channels, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  float scale, zero;
};

// y = x * scale + bias, of each channel.
struct BnInt8Args {
  const uint8_t* x;
  const float *scale, *bias;
  uint8_t* y;
  int64_t channels;
};

// y = a * a_scale [+ b * b_scale] + bias, as uint8 or float.
struct AddInt8Args {
  const uint8_t *a, *b;  // b or null
  void* y;
  bool float_y;
  float a_scale, b_scale, bias;
};

FASTRES_FMA_KERNEL(convert_images, ImageArgs)     // a range counts rows of y, padding included
FASTRES_FMA_KERNEL(max_pool_int8, PoolInt8Args)   // a range counts rows of y
FASTRES_FMA_KERNEL(avg_pool_int8, PoolInt8Args)   // the same
FASTRES_FMA_KERNEL(bn_int8, BnInt8Args)           // a range counts pixels
FASTRES_FMA_KERNEL(add_int8, AddInt8Args)         // a range counts elements

}  // namespace fastres::cpu
