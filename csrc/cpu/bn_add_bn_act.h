// The forward kernel of bn_add_bn_act; its backward is that of bn_add_act for x and that of bn_act for the residual.
#pragma once

#include "cpu/bn_args.h"

namespace fastres::cpu {

struct BnAddBnActArgs {
  const BnArgs& bn;        // x, its tables, out
  const BnArgs& residual;  // the residual as its x, and its tables
};

FASTRES_CPU_KERNEL(bn_add_bn_act_forward, BnAddBnActArgs)  // rows

}  // namespace fastres::cpu
