// What every CPU binding needs between its checks and its kernel.
#pragma once

#include "binding/check.h"
#include "common/types.h"

namespace fastres::cpu {

// Elements that one thread should have at least, as in torch.
constexpr int64_t kGrain = 32768;

// Outputs from this size on are written past the caches: they would evict what the next op reads, and an ordinary store
// reads the line before it writes it.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

inline bool should_stream(int64_t numel, DType dtype) { return numel * element_size(dtype) >= kStreamBytes; }

inline Act act_of(const char* op, const std::string& act) { return is_relu(op, act) ? Act::kRelu : Act::kNone; }

}  // namespace fastres::cpu
