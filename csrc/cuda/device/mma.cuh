// Instructions of sm_80 and newer: copies to shared memory that nobody waits for at once, products of a warp.
// Fragments follow PTX: of lane l, g = l / 4 and t = l % 4.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastres::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

// The block's dynamic shared memory.
__device__ __forceinline__ uint8_t* dynamic_memory() {
  extern __shared__ __align__(16) uint8_t dynamic_bytes[];
  return dynamic_bytes;
}

__device__ __forceinline__ uint32_t address_in_shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes, both ends aligned to them; zeros where not inside, and nothing is read.
__device__ __forceinline__ void copy_16_bytes(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_in_shared(to)), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kLeft groups of this thread's copies are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements: row l % 8 of matrix l / 8 lies at lane l's address, aligned to 16 bytes. Each lane
// gets of matrix i, in m[i], rows 2 t and 2 t + 1 of column g.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address_in_shared(row))
               : "memory");
}

// acc (16 x 8) += a (16 x 16) times b (16 x 8). A lane holds, two elements a register, of a: row g, columns 2 t and 2 t + 1;
// row g + 8 of these; and both of columns 8 further; of b: rows 2 t and 2 t + 1 of column g, and 8 further; of acc: row g,
// columns 2 t and 2 t + 1, then row g + 8.
template <typename T>
__device__ __forceinline__ void warp_product(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#define FASTRES_WARP_PRODUCT(type)                                                                                  \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "  \
      "{%0, %1, %2, %3};"                                                                                           \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) {
    FASTRES_WARP_PRODUCT("f16");
  } else {
    FASTRES_WARP_PRODUCT("bf16");
  }
#undef FASTRES_WARP_PRODUCT
}

// The same for the first 8 columns of a and rows of b.
template <typename T>
__device__ __forceinline__ void warp_product(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
#define FASTRES_WARP_PRODUCT(type)                                                                                  \
  asm("mma.sync.aligned.m16n8k8.row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                                      \
      : "r"(a0), "r"(a1), "r"(b0))
  if constexpr (std::is_same_v<T, __half>) {
    FASTRES_WARP_PRODUCT("f16");
  } else {
    FASTRES_WARP_PRODUCT("bf16");
  }
#undef FASTRES_WARP_PRODUCT
}

#endif  // sm_80

}  // namespace fastres::cuda
