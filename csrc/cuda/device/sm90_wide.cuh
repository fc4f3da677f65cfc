// Hopper's widest product, 64 x 256, and what turns its accumulators round: stores of transposed matrices.
// Names and fragments follow PTX.
#pragma once

#include "cuda/device/mma.cuh"
#include "cuda/device/sm90.cuh"

namespace fastres::cuda::sm90 {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// acc (64 x 256) = a (64 x 16) times the transpose of b (256 x 16), plus acc where accumulate is not 0. Of warp w, lane l
// holds in acc[4 j + 2 i + k] row 16 w + l / 4 + 8 i, column 8 j + 2 (l % 4) + k. Operands may begin at any row of 128 bytes:
// the swizzle goes by the address of each element.
template <typename T>
__device__ __forceinline__ void wide_product(float (&acc)[128], uint64_t a, uint64_t b, int accumulate) {
#define FASTRES_8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
                     "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define FASTRES_32(i) FASTRES_8(i), FASTRES_8(i + 8), FASTRES_8(i + 16), FASTRES_8(i + 24)
#define FASTRES_PRODUCT(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "   \
      "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "   \
      "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "  \
      "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "      \
      "%123, %124, %125, %126, %127}, %128, %129, p, 1, 1, 0, 0; }"                                                 \
      : FASTRES_32(0), FASTRES_32(32), FASTRES_32(64), FASTRES_32(96)                                               \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FASTRES_PRODUCT("f16");
  } else {
    FASTRES_PRODUCT("bf16");
  }
#undef FASTRES_PRODUCT
#undef FASTRES_32
#undef FASTRES_8
}

// The way back of load_transposed: row l % 8 of matrix l / 8 goes to lane l's address, aligned to 16 bytes.
__device__ __forceinline__ void store_transposed(void* row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address_in_shared(row)),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}

// What the warp's lanes wrote to shared memory, all of them see.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

#endif  // sm_90a

}  // namespace fastres::cuda::sm90
