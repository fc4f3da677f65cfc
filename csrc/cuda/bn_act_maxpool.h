// bn_act_maxpool: y = max over a window of act(bn(x)), statistics given; and the gradients of x, weight and bias.
#pragma once

#include "cuda/bn_act.h"
#include "cuda/bn_act_backward.h"

namespace fastres::cuda {

constexpr int kNoTap = 0xff;  // a window whose gradient the ReLU stops; so a window has fewer positions than this

struct PlaneSize {
  int h, w;
};

struct Pool {
  PlaneSize in, out, kernel, stride, padding;
};

struct BnActMaxpoolParams {
  BnActParams bn;  // its geometry is that of y
  Pool pool;
};

struct BnActMaxpoolBackwardParams {
  BnActBackwardParams bn;  // its geometry is that of grad_y, over which the sums run, with the elements of x
  Pool pool;
  BnGeometry input;  // that of x
  uint8_t* taps;     // workspace: the position of each maximum in its window, like grad_y
};

cudaError_t launch_bn_act_maxpool(const BnActMaxpoolParams& params, cudaStream_t stream);
cudaError_t launch_bn_act_maxpool_backward(const BnActMaxpoolBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
