// In the place of csrc/cuda/device/lanes.cuh.
#pragma once

#include "cuda/device/mma.cuh"

namespace fastres::cuda {

inline uint32_t from_lane(uint32_t own, int lane) { return gather(own)[lane]; }

inline int settled(int v) { return v; }

}  // namespace fastres::cuda
