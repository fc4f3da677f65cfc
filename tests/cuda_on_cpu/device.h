// Included ahead of a *_kernel.cu, makes it C++ that g++ compiles: clusters of blocks, mostly of one, run one after the other,
// their threads as fibers that change at __syncthreads and where they wait. Shared memory is a static variable.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <functional>

#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
void __syncthreads();

namespace cuda_on_cpu {

cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& thread, unsigned cluster = 1);

constexpr unsigned kMaxFibers = 4096;  // threads of a cluster
// The number of this thread, and of its block, in the cluster.
unsigned fiber();
unsigned rank();
// Whether all threads of a block of this cluster have ended.
bool has_ended(unsigned rank);

// Lets the other threads run until the condition holds.
void wait_until(const std::function<bool()>& condition);
// Lets the other threads run for some rounds.
void pause(int rounds);
// Does this now, or, in every other block, once all threads wait: what happens beside them, at either end of its time.
void beside(std::function<void()> work);

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, void** args, size_t, cudaStream_t) {
  return run(grid, block, [&] { kernel(*static_cast<Params*>(args[0])); });
}

}  // namespace cuda_on_cpu

#define cudaLaunchKernel cuda_on_cpu::launch
