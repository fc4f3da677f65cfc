// The arithmetic that every backend shares, for scalars and for vectors with elementwise operators. No torch, no CUDA headers.
#pragma once

#if defined(__CUDACC__)
#define FASTRES_HD __host__ __device__ __forceinline__
#else
// Never emitted out of line: the CPU kernels compile this header for several x86-64 levels, and the linker keeps one copy.
#define FASTRES_HD inline __attribute__((always_inline))
#endif

namespace fastres {

// torch.relu on the CPU: NaN passes and -0.0 stays -0.0.
template <typename T>
FASTRES_HD T relu(T v) {
  return v < T{} ? T{} : v;
}

// torch.relu on a GPU: NaN passes and -0.0 becomes 0.0.
template <typename T>
FASTRES_HD T gpu_relu(T v) {
  return v <= T{} ? T{} : v;
}

// Gradient of relu at an output that rounds to zero up to `zero_up_to`, which is 0 for an output that is already rounded.
// A NaN output passes its gradient on.
template <typename T, typename S>
FASTRES_HD T relu_gradient(T grad, T y, S zero_up_to) {
  return y <= zero_up_to ? T{} : grad;
}

// Batch normalisation with scale = weight / sqrt(var + eps). The mean is subtracted first: folding it into the bias loses
// all digits where mean/std is large. Two roundings after the subtraction, never an FMA, so that a backward that
// recomputes its forward gets the same bits on every machine.
template <typename T>
FASTRES_HD T normalise(T x, T mean, T scale, T bias) {
  return (x - mean) * scale + bias;
}

// Gradient of batch normalisation: dz - mean(dz) - (x - mean) * slope, times scale; slope = invstd^2 * mean(dz * (x - mean)).
// Statistics that are constants (evaluation) have mean_dz = slope = 0.
template <typename T>
FASTRES_HD T normalise_grad(T dz, T x, T mean, T scale, T mean_dz, T slope) {
  return (dz - mean_dz - (x - mean) * slope) * scale;
}

}  // namespace fastres
