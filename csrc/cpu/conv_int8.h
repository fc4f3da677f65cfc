// Arguments and kernel of the convolution of 8-bit integers; a range counts units of its output.
#pragma once

#include "cpu/conv_bn_act.h"

namespace fastres::cpu {

// Of `conv` x, residual and y are uint8, a pixel whole words of four; weights are int8. An output is
// sum * scale + bias [+ residual * residual_scale], with the scale and bias of its channel, rounded to even and held
// within 0..255, or a float that is neither. Where x has a zero point, the bias accounts for it, and x has no padding.
// Weights, scale and bias of each whole block of 64 channels of a uint8 output come in the order in which its bytes are
// packed: at 16 v + 4 l + i channel 16 l + 4 v + i.
struct ConvInt8Args {
  ConvArgs conv;
  const float* scale;
  float residual_scale;
  bool float_y;
};

FASTRES_FMA_KERNEL(conv_int8_forward, ConvInt8Args)  // with has_int8_dot() only

}  // namespace fastres::cpu
