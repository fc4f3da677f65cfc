// In the place of csrc/cuda/device/mma.cuh: the same names, done by fibers. Copies happen when they are issued or when they are
// waited for, by turns of blocks; what lanes do together happens once all of the warp have come.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <vector>

namespace fastres::cuda {

constexpr unsigned kWarps = cuda_on_cpu::kMaxFibers / 32;

struct Copies {
  std::vector<std::function<void()>> issued;
  std::vector<std::vector<std::function<void()>>> groups;
};
inline Copies& copies() {
  static Copies of[cuda_on_cpu::kMaxFibers];
  return of[cuda_on_cpu::fiber()];
}

constexpr unsigned kMostBlocks = 8;          // of a cluster
constexpr ptrdiff_t kMostShared = 227 << 10;  // bytes of dynamic memory of each, one after the other

// Of NaN at the start of each block: what a block reads it must have written. A thread asks once, before its copies.
inline uint8_t* dynamic_memory() {
  alignas(16) static uint8_t memory[kMostBlocks][kMostShared];
  static unsigned left[kMostBlocks];  // threads that have yet to ask
  const unsigned rank = cuda_on_cpu::rank();
  if (left[rank] == 0) {
    left[rank] = blockDim.x;
    memset(memory[rank], 0xff, kMostShared);
  }
  --left[rank];
  copies() = {};
  return memory[rank];
}

inline void copy_16_bytes(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    throw std::runtime_error("a copy that is not aligned to 16 bytes");
  const auto copy = [=] { inside ? memcpy(to, from, 16) : memset(to, 0, 16); };
  if (blockIdx.x % 2 == 0) copy();
  else copies().issued.push_back(copy);
}
inline void commit_copies() { copies().groups.push_back(std::move(copies().issued)), copies().issued.clear(); }

template <int kLeft>
void wait_for_copies() {
  auto& groups = copies().groups;
  for (; groups.size() > kLeft; groups.erase(groups.begin()))
    for (auto& copy : groups.front()) copy();
}

// What the lanes of a warp bring to something they do together, in two slots: none of them can be two steps ahead.
template <typename T>
const T* gather(const T& own) {
  struct Warp {
    T values[2][32];
    unsigned steps[32];
  };
  static Warp warps[kWarps];
  Warp& warp = warps[cuda_on_cpu::fiber() / 32];
  const unsigned lane = threadIdx.x % 32, step = warp.steps[lane];
  warp.values[step % 2][lane] = own;
  warp.steps[lane] = step + 1;
  cuda_on_cpu::wait_until([&warp, step] {
    for (const unsigned steps : warp.steps)
      if (steps == step) return false;
    return true;
  });
  return warp.values[step % 2];
}

inline void load_transposed(uint32_t (&m)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix that is not aligned to 16 bytes");
  const void* const* rows = gather(row);
  const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) memcpy(pair + k, static_cast<const uint16_t*>(rows[8 * i + 2 * t + k]) + g, 2);
    memcpy(m + i, pair, 4);
  }
}

// What 16 bits are as a float: by bits, where CUDA's own takes a branch for each kind of number.
template <typename T>
float value_of(uint16_t bits) {
  uint32_t wide = uint32_t{bits} << 16;
  float value;
  if constexpr (std::is_same_v<T, __half>) wide = (bits & 0x8000u) << 16 | (bits & 0x7fffu) << 13;
  if constexpr (std::is_same_v<T, __half>) wide |= (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
  memcpy(&value, &wide, 4);
  if constexpr (std::is_same_v<T, __half>) value *= 0x1p112f;  // between the two exponents
  return value;
}

// What a lane holds of both operands.
struct Fragments {
  float a[8], b[4];
};

template <typename T>
void take(float* to, uint32_t pair) {
  to[0] = value_of<T>(static_cast<uint16_t>(pair)), to[1] = value_of<T>(static_cast<uint16_t>(pair >> 16));
}

template <int kDepth>
void warp_product(float (&acc)[4], const Fragments& own) {
  const Fragments* of = gather(own);
  const Fragments *const row = of + threadIdx.x % 32 / 4 * 4, *const column = of + threadIdx.x % 4 * 8;
  float sums[] = {acc[0], acc[1], acc[2], acc[3]};
  for (int k = 0; k < kDepth; k += 2) {
    const float *const a = row[k % 8 / 2].a + k / 8 * 4, *const b = column[k % 8 / 2].b + k / 8 * 2;
    const float* const next = column[4 + k % 8 / 2].b + k / 8 * 2;
    for (int i = 0; i < 2; ++i) {
      sums[0] += a[i] * b[i], sums[1] += a[i] * next[i];
      sums[2] += a[2 + i] * b[i], sums[3] += a[2 + i] * next[i];
    }
  }
  for (int i = 0; i < 4; ++i) acc[i] = sums[i];
}

template <typename T>
void warp_product(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments own;
  for (int i = 0; i < 4; ++i) take<T>(own.a + 2 * i, a[i]);
  take<T>(own.b, b0), take<T>(own.b + 2, b1);
  warp_product<16>(acc, own);
}
template <typename T>
void warp_product(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  Fragments own;
  take<T>(own.a, a0), take<T>(own.a + 2, a1), take<T>(own.b, b0);
  warp_product<8>(acc, own);
}

}  // namespace fastres::cuda
