// add_act: y = act(x + residual), and its gradient.
#pragma once

#include <cuda_runtime_api.h>

#include "common/types.h"

namespace fastres::cuda {

struct AddActParams {
  DType dtype;
  bool relu;
  int64_t numel;  // of dense storage, in the same order for all
  const void* a;  // forward: x, backward: grad_y
  const void* b;  // forward: residual, backward: y
  void* out;
};

cudaError_t launch_add_act(const AddActParams& params, cudaStream_t stream);
cudaError_t launch_add_act_backward(const AddActParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
