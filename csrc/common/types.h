// The words that kernels and bindings share: element types, activations, memory layouts. No torch, no CUDA headers.
#pragma once

#include <cstdint>

namespace fastres {

enum class DType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
enum class Act : int { kNone, kRelu };

// Storage of the 16-bit formats on the CPU; arithmetic happens in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The largest value that rounds to zero in a storage type (half its smallest subnormal; ties go to even).
template <typename scalar_t>
constexpr float kZeroUpTo = 0.0f;
template <>
constexpr float kZeroUpTo<bf16> = 0x1p-134f;
template <>
constexpr float kZeroUpTo<fp16> = 0x1p-25f;

}  // namespace fastres
