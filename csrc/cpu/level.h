// x86-64 levels: each *_kernel.cpp is compiled once per level into its own namespace, and the machine chooses at run time.
#pragma once

#include <cstdint>

namespace fastres::cpu {

// 1: any machine, 3: AVX2 + FMA + F16C, 4: AVX-512 F/BW/DQ/VL.
inline int cpu_level() {
#if defined(__x86_64__)
  static const int level = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("lzcnt");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512cd");
    return v4 ? 4 : v3 ? 3 : 1;
  }();
  return level;
#else
  return 1;
#endif
}

// Whether this machine multiplies pairs of bfloat16 (VDPBF16PS); level 4 alone does not say so.
inline bool has_bf16_dot() {
#if defined(__x86_64__)
  return cpu_level() >= 4 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Whether this machine multiplies fours of 8-bit integers (VPDPBUSD); level 4 alone does not say so.
inline bool has_int8_dot() {
#if defined(__x86_64__)
  return cpu_level() >= 4 && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

}  // namespace fastres::cpu

// Declares `void name(const Args&, int64_t begin, int64_t end)` for every level, and the function that forwards to this
// machine's. All kernels have this one shape: the work of a range of a parallel loop.
#if defined(__x86_64__)
// For kernels made of fused multiply-adds: levels 3 and 4 only; the binding refuses on a lesser machine.
#define FASTRES_FMA_KERNEL(name, Args)                                     \
  namespace v3 { void name(const Args&, int64_t, int64_t); }               \
  namespace v4 { void name(const Args&, int64_t, int64_t); }               \
  inline void name(const Args& args, int64_t begin, int64_t end) {         \
    return cpu_level() >= 4 ? v4::name(args, begin, end) : v3::name(args, begin, end); \
  }
#define FASTRES_CPU_KERNEL(name, Args)                                     \
  namespace v1 { void name(const Args&, int64_t, int64_t); }               \
  namespace v3 { void name(const Args&, int64_t, int64_t); }               \
  namespace v4 { void name(const Args&, int64_t, int64_t); }               \
  inline void name(const Args& args, int64_t begin, int64_t end) {         \
    switch (cpu_level()) {                                                 \
      case 4: return v4::name(args, begin, end);                           \
      case 3: return v3::name(args, begin, end);                           \
      default: return v1::name(args, begin, end);                          \
    }                                                                      \
  }
#else
#define FASTRES_FMA_KERNEL(name, Args) \
  inline void name(const Args&, int64_t, int64_t) {}
#define FASTRES_CPU_KERNEL(name, Args)                                     \
  namespace v1 { void name(const Args&, int64_t, int64_t); }               \
  inline void name(const Args& args, int64_t begin, int64_t end) { v1::name(args, begin, end); }
#endif
