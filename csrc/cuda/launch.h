// What launchers share. No torch, no CUDA headers: bindings include it too.
#pragma once

#include <cstdint>

namespace fastres::cuda {

constexpr int kThreads = 256;  // of a block
constexpr int kUnroll = 4;     // vectors of each operand that a thread has in flight

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether 16-byte accesses are legal.
inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace fastres::cuda
