// Arguments and kernels of add_act; a range counts elements of dense storage.
#pragma once

#include "common/types.h"
#include "cpu/level.h"

namespace fastres::cpu {

struct AddActArgs {
  DType dtype;
  Act act;
  bool stream;     // write past the caches
  const void* a;   // forward: x, backward: grad_y
  const void* b;   // forward: residual or null, backward: y
  void* out;
};

FASTRES_CPU_KERNEL(add_act_forward, AddActArgs)
FASTRES_CPU_KERNEL(add_act_gradient, AddActArgs)

}  // namespace fastres::cpu
