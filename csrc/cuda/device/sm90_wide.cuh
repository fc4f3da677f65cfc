// Hopper's widest product, 64 x 256, what turns its accumulators round, stores of transposed matrices, and clusters' loads: its
// blocks share what one of them loads. Names and fragments follow PTX.
#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/sm90.cuh"

namespace fastres::cuda::sm90 {

// How many of these clusters the device runs at a time: fewer than its multiprocessors would hold, which lie in groups.
template <typename Params>
cudaError_t clusters_at_once(int* count, void (*kernel)(Params), unsigned threads, unsigned cluster, size_t shared_bytes) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  const cudaLaunchConfig_t config{dim3(cluster), dim3(threads), shared_bytes, nullptr, &attribute, 1};
  return cudaOccupancyMaxActiveClusters(count, reinterpret_cast<const void*>(kernel), &config);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Arrives once at the barrier that another block, or this one, has in this place, once products that were waited for have read
// what the barrier is about. It publishes no writes: a release at the cluster's scope would wait for all that the thread wrote.
__device__ __forceinline__ void arrive_at(Barrier& barrier, int rank) {
  asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
                   shared_address(&barrier)),
               "r"(rank)
               : "memory");
}

// load_pixels, to this place in all of the so many blocks of the cluster, each of which waits at its own barrier.
__device__ __forceinline__ void load_pixels_everywhere(void* to, const TileMap& map, Barrier& barrier, int channel, int x, int y,
                                                       int image, int right, int down, int blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(static_cast<uint16_t>(right)),
      "h"(static_cast<uint16_t>(down)), "h"(static_cast<uint16_t>((1 << blocks) - 1))
      : "memory");
}

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

// Zeros for accumulators. Left undefined, their registers would be kept from one tile to the next; defined by the compiler, so
// late that products under way had to wait.
template <int kCount>
__device__ __forceinline__ void clear(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(acc[i]));
}

// acc (64 x 32) = a (64 x 16) times the transpose of b (32 x 16), plus acc where accumulate is not 0: as wide_product.
template <typename T>
__device__ __forceinline__ void narrow_product(float (&acc)[16], uint64_t a, uint64_t b, int accumulate) {
#define FASTRES_8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
                     "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define FASTRES_PRODUCT(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{ .reg .pred p; setp.ne.b32 p, %18, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type            \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, 0, 0; }"         \
      : FASTRES_8(0), FASTRES_8(8)                                                                                  \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FASTRES_PRODUCT("f16");
  } else {
    FASTRES_PRODUCT("bf16");
  }
#undef FASTRES_PRODUCT
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

// A bit for each lane of the warp: whether it says yes.
__device__ __forceinline__ uint32_t vote(bool yes) { return __ballot_sync(~0u, yes); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }

// The sum of four lanes in a row, the same in each.
__device__ __forceinline__ float sum_of_quad(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// The same for the four warps of a warpgroup, of this number in the block.
__device__ __forceinline__ void sync_group(int number) {
  asm volatile("bar.sync %0, 128;" ::"r"(number + 1) : "memory");
}

// The way back of load_pixels, without a shift; what lies beyond the images is not written.
__device__ __forceinline__ void store_pixels(const TileMap& map, const void* from, int channel, int x, int y, int image) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.im2col_no_offs.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(channel), "r"(x), "r"(y), "r"(image)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until of this thread's groups of stores at most kLeft have yet to read shared memory.
template <int kLeft>
__device__ __forceinline__ void wait_for_stores_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kLeft) : "memory");
}

#endif  // sm_90a

}  // namespace fastres::cuda::sm90
