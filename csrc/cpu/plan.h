// A frozen network on the CPU: the rows of its program, and the kernels that only programs use.
#pragma once

#include "common/types.h"
#include "cpu/level.h"

namespace fastres::cpu {

enum class Step : int64_t { kSegment, kPad, kConv, kMaxPool, kAvgPool, kBn, kAdd, kUpsample, kGate, kActivation, kCopy };
enum class Function : int64_t { kSigmoid, kSilu, kHardSigmoid, kHardSwish, kLeakyRelu, kClamp };

// A value: bytes into the arena, or one of the tensors of the call (kOutput - i for its output i); `step` bytes from one image of the batch to the next,
// 0 where the arena holds only the images of one pass.
struct Place {
  int64_t offset, step;
};
constexpr int64_t kNone = -1, kInput = -2, kOutput = -3;  // the first output

// One row of a program. A segment is followed by `count` steps, which run for `chunk` images at a time, so that what
// passes between them stays in the caches. Activations are channels last, without gaps. `weight` and `bias` count the
// constants of the call: packed weights and a bias for kConv, rows of mean, scale and bias for kBn. kPad copies every
// stride-th pixel of the input, or of a value, and adds padding and channels of zeros. kUpsample gives the nearest pixel of x for
// each of y, or adds it to each of the residual. kGate multiplies each image's channels by its gate. kCopy copies channels of x,
// from `begin` on, to those of y from `at` on. With `int8` all values are uint8, but for the input and the output, which are of
// the call's dtype; `bias` counts the float constants that plan_int8.cpp tells.
struct PlanRow {
  Step kind;
  int64_t count, chunk;
  Place x, residual, y;
  int64_t weight, bias, relu;
  int64_t channels, height, width, out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t run;       // of a convolution, in words of one group; its pixels hold `channels` values. Of a copy, its channels. Of an
                     // average, what sums are divided by, 0 for the pixels inside the image. Of an activation, its function
  int64_t groups;
  int64_t winograd;  // whether its weights are transformed, for a 3x3 convolution with stride 1
  int64_t int8;
  Place gate;
  int64_t begin, at;  // of a copy's channels, in x and in y
  double low, high;   // of an activation
};
constexpr int64_t kRowFields = sizeof(PlanRow) / sizeof(int64_t);

struct PoolArgs {
  DType dtype;
  const void* x;
  void* y;
  int64_t images, channels, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, divisor;
};

struct BnPixelsArgs {
  DType dtype;
  Act act;
  const void* x;
  const float* constants;  // mean, scale and bias of each channel
  void* y;
  int64_t channels;
};

struct UpsampleArgs {
  DType dtype;
  Act act;
  const void *x, *residual;  // residual: nullptr for none
  void* y;
  int64_t channels, height, width, out_h, out_w;
};

struct GateArgs {
  DType dtype;
  Act act;
  const void *x, *gate, *residual;  // residual: nullptr for none
  void* y;
  int64_t channels, pixels;  // of an image
};

struct ActivationArgs {
  DType dtype;
  Function function;
  float low, high;  // the slope of a leaky ReLU is low
  const void* x;
  void* y;  // may be x
};

FASTRES_FMA_KERNEL(max_pool, PoolArgs)  // a range counts rows of y
FASTRES_FMA_KERNEL(avg_pool, PoolArgs)  // the same; divisor: 0 for the number of pixels inside the image
FASTRES_FMA_KERNEL(bn_pixels, BnPixelsArgs)  // a range counts pixels
FASTRES_FMA_KERNEL(upsample_add, UpsampleArgs)  // a range counts rows of y
FASTRES_FMA_KERNEL(gate_channels, GateArgs)  // a range counts pixels
FASTRES_FMA_KERNEL(activation, ActivationArgs)  // a range counts values

}  // namespace fastres::cpu
