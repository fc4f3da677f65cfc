// Formula: bit i % 8 of byte i / 8 is set where not (y[i] <= 0); bits beyond the last element are 0.
// Layout: y in memory order; a thread owns a byte.
// Bytes per element: one read, an eighth of a byte written.
// Accumulate type: none.
// Invariants: every byte is written once.
#include "cuda/device/vec.cuh"
#include "cuda/relu_mask.h"

namespace fastres::cuda {

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) relu_mask_kernel(const __grid_constant__ ReluMaskParams p) {
  const auto* y = static_cast<const scalar_t*>(p.y);
  const int64_t byte = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, first = byte * 8;
  if (first >= p.numel) return;
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (first + j < p.numel && !(to_float(y[first + j]) <= 0.0f)) bits |= 1u << j;
  p.mask[byte] = static_cast<uint8_t>(bits);
}

cudaError_t launch_relu_mask(const ReluMaskParams& params, cudaStream_t stream) {
  const int64_t blocks = ceil_div(params.numel, int64_t{8} * kThreads);
  return with_dtype(params.dtype, [&](auto type) {
    return launch(relu_mask_kernel<decltype(type)>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), params, stream);
  });
}

}  // namespace fastres::cuda
