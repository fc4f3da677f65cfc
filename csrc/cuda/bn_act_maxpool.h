// bn_act_maxpool: y = max over a window of act(bn(x)), statistics given; and the gradients of x, weight and bias.
#pragma once

#include "cuda/bn_act.h"
#include "cuda/bn_act_backward.h"

namespace fastres::cuda {

constexpr int kNoTap = 0xff;  // a window whose gradient the ReLU stops; so a window has fewer positions than this
constexpr int kMostStripRows = 16;  // a thread reads one row of x twice in 2 * 16

struct PlaneSize {
  int h, w;
};

// The windows of a ResNet's stem are walked down (device/pool_strip.cuh): a position of a geometry is then a strip of a column
// of y. Else it is a pixel, and there are no strips.
struct Pool {
  PlaneSize in, out, kernel, stride, padding;
  int strips, strip_rows;  // of a column
};

struct BnActMaxpoolParams {
  BnActParams bn;  // its geometry is that of y
  Pool pool;
};

struct BnActMaxpoolBackwardParams {
  BnActBackwardParams bn;  // its geometry is that of grad_y, over which the sums run, with the elements of x
  Pool pool;
  BnGeometry input;  // that of x, or of y where strips are walked down
  uint8_t* taps;     // workspace: the position of each maximum in its window, like grad_y
};

cudaError_t launch_bn_act_maxpool(const BnActMaxpoolParams& params, cudaStream_t stream);
cudaError_t launch_bn_act_maxpool_backward(const BnActMaxpoolBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
