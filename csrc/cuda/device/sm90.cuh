// Hopper's own instructions: barriers in shared memory, copies of tiles by the TMA unit, products of a warpgroup.
// Names and waits follow PTX; operands in shared memory are rows of 128 bytes in the 128-byte swizzle.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cuda/conv_bn_act.h"

namespace fastres::cuda::sm90 {

constexpr int kRowBytes = 128;  // of a tile: 64 elements of 16 bits, the span of the swizzle

// --- tensor maps: what the TMA unit knows of a tensor of 16-bit elements, aligned to 16 bytes, its rows too -------------

using TileMap = CUtensorMap;

// A function of the driver, which this library does not link.
template <typename F>
F driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  return reinterpret_cast<F>(found);
}

inline CUtensorMapDataType map_type(DType dtype) {
  return dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Rows of `taps` parts of `columns` elements, read and written in boxes of box_rows x 64 of one part; beyond the edges zeros
// are read and nothing is written.
inline cudaError_t make_tile_map(TileMap* map, DType dtype, const void* base, int64_t rows, int64_t taps, int64_t columns,
                                 int box_rows) {
  static const auto encode = driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(taps), cuuint64_t(rows)};
  const cuuint64_t strides[] = {cuuint64_t(2 * columns), cuuint64_t(2 * columns * taps)};
  const cuuint32_t box[] = {kRowBytes / 2, 1, cuuint32_t(box_rows)}, steps[] = {1, 1, 1};
  const CUresult status = encode(map, map_type(dtype), 3, const_cast<void*>(base), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Images in NHWC under a window, read as the pixels below one tap of it, one for each output pixel, 64 channels of each.
inline cudaError_t make_image_map(TileMap* map, DType dtype, const void* base, const Images& x, const Window& window,
                                  int pixels) {
  static const auto encode = driver<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (encode == nullptr) return cudaErrorInsufficientDriver;
  const cuuint64_t sizes[] = {cuuint64_t(x.channels), cuuint64_t(x.width), cuuint64_t(x.height), cuuint64_t(x.count)};
  const cuuint64_t row = 2 * sizes[0], strides[] = {row, row * sizes[1], row * sizes[1] * sizes[2]};
  // The first tap of all windows lies between these corners, relative to the first and the last pixel.
  const int first[] = {-window.w.padding, -window.h.padding}, last[] = {window.w.last(), window.h.last()};
  const cuuint32_t steps[] = {1, cuuint32_t(window.w.stride), cuuint32_t(window.h.stride), 1};
  const CUresult status = encode(map, map_type(dtype), 4, const_cast<void*>(base), sizes, strides, first, last,
                                 kRowBytes / 2, cuuint32_t(pixels), steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Launches a kernel that may begin while the one before it in the stream ends, for which it waits itself.
template <typename Params>
cudaError_t launch_behind(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, size_t shared_bytes,
                          cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Device code below is compiled for sm_90a only, where these instructions exist.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// --- barriers ----------------------------------------------------------------------------------------

// Completes a phase when its arrivals and the bytes announced are in; phases alternate between parity 0 and 1.
struct Barrier {
  uint64_t state;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals));
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // Arrives once, and announces bytes that copies will bring.
  __device__ void arrive_and_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  // Until the phase of this parity is complete; parity 1 of a barrier just made is.
  __device__ void wait(int parity) {
    uint32_t done;
    do {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(shared_address(this)), "r"(parity)
                   : "memory");
    } while (!done);
  }
#endif
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// --- kernels that begin while the one before them in the stream ends ----------------------------------

// Until that one is over and what it wrote is seen; before it, nothing that a kernel writes may be read.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// The block's dynamic shared memory, aligned to the period of the swizzle.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return *reinterpret_cast<T*>(memory);
}

// Makes barriers just made visible to the TMA unit.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
}

// --- copies of tiles ---------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch(const TileMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box at this column, part and row, to be waited for on the barrier.
__device__ __forceinline__ void load_tile(void* to, const TileMap& map, Barrier& barrier, int column, int tap, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(tap), "r"(row)
      : "memory");
}

// Pixels from that under the window's first tap at (x, y) of an image on, shifted to another tap.
__device__ __forceinline__ void load_pixels(void* to, const TileMap& map, Barrier& barrier, int channel, int x, int y,
                                            int image, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(static_cast<uint16_t>(right)),
      "h"(static_cast<uint16_t>(down))
      : "memory");
}

__device__ __forceinline__ void store_tile(const TileMap& map, const void* from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, 0, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(column), "r"(row)
               : "memory");
}

// Until all stores of this thread have read shared memory.
__device__ __forceinline__ void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// What this thread wrote to shared memory is seen by stores that follow.
__device__ __forceinline__ void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- registers and products of a warpgroup -----------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// An operand whose rows of 64 elements lie one after the other from p, which is aligned to 1024 bytes but for the first
// element: 16 elements further along the row is 32 bytes further here too.
__device__ __forceinline__ uint64_t operand(const void* p) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{8 * kRowBytes / 16} << 32;
  return kSwizzle128 | kEightRows | (uint64_t{1} << 16) | ((shared_address(p) & 0x3ffff) >> 4);
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kLeft groups of products are under way.
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps accumulators in their registers and the compiler's own accesses on their side of a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&acc)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// acc (64 x 128) = a (64 x 16) times the transpose of b (128 x 16), plus acc where accumulate is not 0. Of warp w, lane l
// holds in acc[4 j + 2 i + k] row 16 w + l / 4 + 8 i, column 8 j + 2 (l % 4) + k.
template <typename T>
__device__ __forceinline__ void product(float (&acc)[64], uint64_t a, uint64_t b, int accumulate) {
#define FASTRES_8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
                     "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define FASTRES_PRODUCT(type)                                                                                       \
  asm volatile(                                                                                                     \
      "{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type           \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
      "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "   \
      "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "       \
      "%64, %65, p, 1, 1, 0, 0; }"                                                                                  \
      : FASTRES_8(0), FASTRES_8(8), FASTRES_8(16), FASTRES_8(24), FASTRES_8(32), FASTRES_8(40), FASTRES_8(48),      \
        FASTRES_8(56)                                                                                               \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (std::is_same_v<T, __half>) {
    FASTRES_PRODUCT("f16");
  } else {
    FASTRES_PRODUCT("bf16");
  }
#undef FASTRES_PRODUCT
#undef FASTRES_8
}

#endif  // sm_90a

}  // namespace fastres::cuda::sm90
