// Arguments and kernels of batch normalisation, shared by bn_act, bn_add_act and bn_act_maxpool.
//
// The kernels see a tensor as rows of `cols` elements in memory order:
//   contiguous     a row is one plane (n, c) of H*W elements, and a table has one entry per channel;
//   channels_last  a row is as many whole pixels as make `cols` a multiple of kColsMultiple, so that vectors never end inside
//                  a row whatever the number of channels; a table has one entry per column. The last row may be incomplete.
#pragma once

#include "common/types.h"
#include "cpu/level.h"

namespace fastres::cpu {

constexpr int64_t kColsMultiple = 16;  // lanes of the widest vector
constexpr int64_t kSumLanes = 8;       // doubles of the widest vector: a contiguous channel sums into so many

struct BnArgs {
  DType dtype;
  Act act;
  bool channels_last;
  bool training;  // backward: statistics depend on x
  bool stream;    // write past the caches
  int64_t numel, channels;
  int64_t rows, cols;

  // Reductions run over chunks, a partition that depends on the sizes alone. Contiguous: chunk = (slice of the batch,
  // block of channels). Each chunk, or slice, owns two rows of `width` partial sums.
  int64_t chunks, slices, block;
  int64_t width;
  double* partial;
  double* sums;  // (2, channels), merged

  const void* x;
  const void* residual;
  const void* grad_y;
  const void* grad_y2;  // null, or a second part of the gradient of y, at the end of a block
  uint8_t* mask;  // of a ReLU at the end of a block, see mask.h: training writes it, backward reads it
  void* out;      // y or grad_x
  void* grad_residual;

  // Tables in the accumulate type.
  const void* shift;    // statistics: subtracted before summing
  const void* mean;
  const void* scale;    // weight / sqrt(var + eps)
  const void* bias;
  const void* mean_dz;  // backward, training: see normalise_grad
  const void* slope;
};

FASTRES_CPU_KERNEL(bn_statistics, BnArgs)      // chunks: sums of x - shift and of its square
FASTRES_CPU_KERNEL(bn_merge, BnArgs)           // channels: partial sums to sums
FASTRES_CPU_KERNEL(bn_act_forward, BnArgs)     // rows
FASTRES_CPU_KERNEL(bn_act_sums, BnArgs)        // chunks: sums of dz and of dz * (x - mean)
FASTRES_CPU_KERNEL(bn_act_gradient, BnArgs)    // rows
FASTRES_CPU_KERNEL(bn_add_act_forward, BnArgs)
FASTRES_CPU_KERNEL(bn_add_act_sums, BnArgs)    // chunks: the same sums; writes dz, from which bn_act_gradient goes on

}  // namespace fastres::cpu
