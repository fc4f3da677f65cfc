// Formula: y = act(x + residual); backward: grad = grad_y where y > 0 or y is NaN, else 0.
// Layout: any dense storage order, the same for all operands; a block owns kThreads * kUnroll neighbouring vectors.
// Bytes per element: two reads, one write.
// Accumulate type: float; one rounding, to the output type.
// Invariants: every element is written once; blocks go backwards, from what the producer of the operands left in L2.
#include "common/epilogue.h"
#include "cuda/add_act.h"
#include "cuda/device/vec.cuh"
#include "cuda/launch.h"

namespace fastres::cuda {
namespace {

struct Forward {
  __device__ static float apply(float x, float residual, bool is_relu) {
    const float z = x + residual;
    return is_relu ? gpu_relu(z) : z;
  }
};

struct Backward {
  __device__ static float apply(float grad_y, float y, bool is_relu) {
    return is_relu ? relu_gradient(grad_y, y, 0.0f) : grad_y;
  }
};

template <typename Pass, typename scalar_t, int kVec>
__device__ __forceinline__ void write(scalar_t* out, const Vec<scalar_t, kVec>& a, const Vec<scalar_t, kVec>& b, bool relu) {
  float values[kVec];
#pragma unroll
  for (int j = 0; j < kVec; ++j) values[j] = Pass::apply(to_float(a.v[j]), to_float(b.v[j]), relu);
  store(out, values);
}

template <typename Pass, typename scalar_t, int kVec>
__global__ void __launch_bounds__(kThreads) add_act_kernel(const __grid_constant__ AddActParams p) {
  const auto* a = static_cast<const scalar_t*>(p.a);
  const auto* b = static_cast<const scalar_t*>(p.b);
  auto* out = static_cast<scalar_t*>(p.out);
  const int64_t vectors = p.numel / kVec;
  const int64_t block = gridDim.x - 1 - blockIdx.x;
  const int64_t first = block * (kThreads * kUnroll) + threadIdx.x;

  Vec<scalar_t, kVec> a_in[kUnroll], b_in[kUnroll];
#pragma unroll
  for (int slot = 0; slot < kUnroll; ++slot) {
    const int64_t vector = first + slot * kThreads;
    if (vector >= vectors) continue;
    a_in[slot] = load<kVec>(a + vector * kVec);
    b_in[slot] = load<kVec>(b + vector * kVec);
  }
#pragma unroll
  for (int slot = 0; slot < kUnroll; ++slot) {
    const int64_t vector = first + slot * kThreads;
    if (vector < vectors) write<Pass>(out + vector * kVec, a_in[slot], b_in[slot], p.relu);
  }

  // What does not fill a vector.
  const int64_t rest = vectors * kVec + threadIdx.x;
  if (block == 0 && rest < p.numel) write<Pass>(out + rest, load<1>(a + rest), load<1>(b + rest), p.relu);
}

template <typename Pass>
cudaError_t launch_pass(const AddActParams& p, cudaStream_t stream) {
  return with_dtype(p.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    constexpr int kVec = 16 / sizeof(scalar_t);
    const bool vectors = is_aligned(p.a) && is_aligned(p.b) && is_aligned(p.out);
    const int64_t per_block = int64_t{kThreads} * kUnroll * (vectors ? kVec : 1);
    const dim3 grid(static_cast<unsigned>(ceil_div(p.numel, per_block)));
    const auto kernel = vectors ? add_act_kernel<Pass, scalar_t, kVec> : add_act_kernel<Pass, scalar_t, 1>;
    return launch(kernel, grid, dim3(kThreads), p, stream);
  });
}

}  // namespace

cudaError_t launch_add_act(const AddActParams& params, cudaStream_t stream) { return launch_pass<Forward>(params, stream); }

cudaError_t launch_add_act_backward(const AddActParams& params, cudaStream_t stream) {
  return launch_pass<Backward>(params, stream);
}

}  // namespace fastres::cuda
