// Arguments and kernels of bn_act_maxpool.
//
// An "image" is what pools by itself: one n of channels_last (a pixel holds all channels), one (n, c) of contiguous (a pixel
// is one element). Activated rows live in lines that are split by phase: column q of the padded row is pixel q / stride of
// phase q % stride. A tap of the window then reads consecutive memory for consecutive outputs, in both layouts.
#pragma once

#include "cpu/bn_args.h"

namespace fastres::cpu {

constexpr uint16_t kNoTap = 0xffff;  // a window whose gradient the ReLU stops

struct BnActMaxpoolArgs {
  const BnArgs& bn;  // x, tables, sums; `out` is y or grad_x, grad_y has the sizes of y
  bool stream_y;
  int64_t images, pixel;  // elements of a pixel
  int64_t in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  uint16_t* taps;  // backward: position of each maximum in its window, like grad_y; written by sums, read by gradient

  int64_t phase_size, line_size;  // elements of a phase, and of a line: all phases, and room for loads that run over the end
  const int64_t* tap_offsets;     // where in a line column 0 ... kernel_w - 1 of the first window is
};

FASTRES_CPU_KERNEL(bn_act_maxpool_forward, BnActMaxpoolArgs)   // output rows of all images
FASTRES_CPU_KERNEL(bn_act_maxpool_sums, BnActMaxpoolArgs)      // chunks
FASTRES_CPU_KERNEL(bn_act_maxpool_gradient, BnActMaxpoolArgs)  // input rows of all images

}  // namespace fastres::cpu
