// 16-byte accesses, and element types to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/types.h"

namespace fastres::cuda {

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Vec {
  T v[kVec];
};

// Volatile keeps a batch of loads together: left free, the compiler moves each to its first use, and one is in flight.
__device__ __forceinline__ uint4 load_16_bytes(const void* p) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}

// Brings memory into the L2 cache and waits for nothing.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// kVec is 16 or 32 bytes' worth of elements, or 1; p is aligned to 16 bytes, or to an element.
template <int kVec, typename T>
__device__ __forceinline__ Vec<T, kVec> load(const T* p) {
  Vec<T, kVec> out;
  if constexpr (kVec == 1) {
    out.v[0] = *p;
  } else {
    static_assert(sizeof(out) % 16 == 0);
#pragma unroll
    for (int i = 0; i < kVec; i += 16 / sizeof(T)) {
      const uint4 bits = load_16_bytes(p + i);
      memcpy(static_cast<void*>(out.v + i), &bits, 16);
    }
  }
  return out;
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float(float v) { return v; }
template <>
__device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }

// Rounds to nearest even; the 16-bit types two at a time.
template <typename T, int kVec>
__device__ __forceinline__ Vec<T, kVec> rounded(const float (&values)[kVec]) {
  Vec<T, kVec> out;
  if constexpr (kVec == 1 || sizeof(T) == 4) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) out.v[j] = from_float<T>(values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kVec; j += 2) {
      if constexpr (std::is_same_v<T, __half>) {
        const __half2 pair = __floats2half2_rn(values[j], values[j + 1]);
        out.v[j] = __low2half(pair);
        out.v[j + 1] = __high2half(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(values[j], values[j + 1]);
        out.v[j] = __low2bfloat16(pair);
        out.v[j + 1] = __high2bfloat16(pair);
      }
    }
  }
  return out;
}

template <typename T, int kVec>
__device__ __forceinline__ void store(T* p, const Vec<T, kVec>& out) {
  if constexpr (kVec == 1) {
    *p = out.v[0];
  } else {
    static_assert(sizeof(out) % 16 == 0);
#pragma unroll
    for (int i = 0; i < kVec; i += 16 / sizeof(T)) {
      uint4 bits;
      memcpy(&bits, static_cast<const void*>(out.v + i), 16);
      *reinterpret_cast<uint4*>(p + i) = bits;
    }
  }
}

template <typename T, int kVec>
__device__ __forceinline__ void store(T* p, const float (&values)[kVec]) {
  store(p, rounded<T>(values));
}

// The larger value of each pair; a NaN wins, and of two zeros either may.
template <typename T, int kVec>
__device__ __forceinline__ Vec<T, kVec> maximum(const Vec<T, kVec>& a, const Vec<T, kVec>& b) {
  Vec<T, kVec> out;
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    static_assert(kVec % 2 == 0);
    Pair pairs[3][kVec / 2];
    memcpy(static_cast<void*>(pairs[0]), &a, sizeof(a));
    memcpy(static_cast<void*>(pairs[1]), &b, sizeof(b));
#pragma unroll
    for (int j = 0; j < kVec / 2; ++j) pairs[2][j] = __hmax2_nan(pairs[0][j], pairs[1][j]);
    memcpy(static_cast<void*>(&out), pairs[2], sizeof(out));
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) asm("max.NaN.f32 %0, %1, %2;" : "=f"(out.v[j]) : "f"(a.v[j]), "f"(b.v[j]));
  }
#else
  for (int j = 0; j < kVec; ++j) {
    const float first = to_float(a.v[j]), second = to_float(b.v[j]);
    out.v[j] = first > second || first != first ? a.v[j] : b.v[j];
  }
#endif
  return out;
}

// kBytes (8, 4 or 1) bytes beside a vector of as many elements, in one access; p is aligned to it.
template <int kBytes>
using Bytes = std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint8_t>>;

template <int kBytes>
__device__ __forceinline__ Vec<uint8_t, kBytes> load_bytes(const uint8_t* p) {
  static_assert(sizeof(Bytes<kBytes>) == kBytes);
  Bytes<kBytes> bits;
#if defined(__CUDA_ARCH__)  // volatile as above: it stays behind the batch of vectors that it follows
  if constexpr (kBytes == 8) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(p));
  } else if constexpr (kBytes == 4) {
    asm volatile("ld.global.u32 %0, [%1];" : "=r"(bits) : "l"(p));
  } else {
    bits = *p;
  }
#else
  memcpy(&bits, p, kBytes);
#endif
  Vec<uint8_t, kBytes> out;
  memcpy(&out, &bits, kBytes);
  return out;
}

template <int kBytes>
__device__ __forceinline__ void store_bytes(uint8_t* p, const uint8_t (&values)[kBytes]) {
  Bytes<kBytes> bits;
  memcpy(&bits, values, kBytes);
  *reinterpret_cast<Bytes<kBytes>*>(p) = bits;
}

// The largest value that rounds to zero in T.
template <typename T>
constexpr float kRoundsToZero = 0.0f;
template <>
inline constexpr float kRoundsToZero<__half> = kZeroUpTo<fp16>;
template <>
inline constexpr float kRoundsToZero<__nv_bfloat16> = kZeroUpTo<bf16>;

// Calls f(T{}) with the element type of a dtype; float64 has no kernels.
template <typename F>
cudaError_t with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat16: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    default: return cudaErrorInvalidValue;
  }
}

// A kernel launched by launch_behind() may start while the one before it still runs: until it has waited here it must neither
// read what kernels before it write nor write anything; all its threads wait.
__device__ __forceinline__ void wait_for_the_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start once all blocks have come here; what it reads it waits for.
__device__ __forceinline__ void let_the_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Launches and returns what the runtime says of it.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, Params params, cudaStream_t stream) {
  void* args[] = {&params};
  return cudaLaunchKernel(kernel, grid, block, args, 0, stream);
}

// The same for a kernel that waits for the one before it, where the code that runs on the device has the instructions for it.
template <typename Params>
cudaError_t launch_behind(void (*kernel)(Params), dim3 grid, dim3 block, Params params, cudaStream_t stream) {
#if defined(__CUDACC__)
  constexpr int kArchs[] = {__CUDA_ARCH_LIST__};  // ascending
  int device = 0, major = 0;
  if (kArchs[sizeof(kArchs) / sizeof(kArchs[0]) - 1] >= 900 && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9) {
    void* args[] = {&params};
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), args);
  }
#endif
  return launch(kernel, grid, block, params, stream);
}

}  // namespace fastres::cuda
