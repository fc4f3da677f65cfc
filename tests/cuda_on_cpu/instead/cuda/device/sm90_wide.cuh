// In the place of csrc/cuda/device/sm90_wide.cuh: the same names, done by fibers.
#pragma once

#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/sm90.cuh"

namespace fastres::cuda::sm90 {

template <typename T>
void wide_product(float (&acc)[128], uint64_t a, uint64_t b, int accumulate) {
  product<T, 128>(acc, a, b, accumulate);
}

template <int kCount>
void clear(float (&acc)[kCount]) {
  for (float& v : acc) v = 0.0f;
}

template <typename T>
void narrow_product(float (&acc)[16], uint64_t a, uint64_t b, int accumulate) {
  product<T, 16>(acc, a, b, accumulate);
}

inline void store_transposed(void* row, const uint32_t (&m)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("a row of a matrix that is not aligned to 16 bytes");
  struct Lane {
    void* row;
    uint32_t m[4];
  };
  const Lane* of = gather(Lane{row, {m[0], m[1], m[2], m[3]}});
  const unsigned lane = threadIdx.x % 32, matrix = lane / 8, column = lane % 8;
  // Each lane writes the row whose address it gave: the column of that number of the matrix as it lies in registers.
  for (unsigned g = 0; g < 8; ++g) {
    const uint32_t pair = of[4 * g + column / 2].m[matrix];
    const uint16_t value = static_cast<uint16_t>(column % 2 == 0 ? pair : pair >> 16);
    memcpy(static_cast<uint16_t*>(row) + g, &value, 2);
  }
}

inline void sync_warp() { gather(0); }

inline uint32_t vote(bool yes) {
  const bool* of = gather(yes);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t{of[lane]} << lane;
  return bits;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline float sum_of_quad(float v) {
  const float* of = gather(v) + threadIdx.x % 32 / 4 * 4;
  return (of[0] + of[1]) + (of[2] + of[3]);
}

// Until all threads of a warpgroup have come.
inline void sync_group(int) {
  static unsigned come[cuda_on_cpu::kMaxFibers / 128], rounds[cuda_on_cpu::kMaxFibers / 128];
  const unsigned group = cuda_on_cpu::fiber() / 128, round = rounds[group];
  if (++come[group] == 128) come[group] = 0, ++rounds[group];
  cuda_on_cpu::wait_until([=] { return rounds[group] != round; });
}

// The stores that each thread has issued; other threads run on before they read.
inline std::vector<std::vector<std::function<void()>>>& groups_of_stores() {
  static std::vector<std::vector<std::function<void()>>> of[cuda_on_cpu::kMaxFibers];
  auto& own = of[cuda_on_cpu::fiber()];
  if (own.empty()) own.emplace_back();
  return own;
}

inline void store_pixels(const TileMap& map, const void* from, int channel, int x, int y, int image) {
  groups_of_stores().back().push_back([=, &map] {
    const auto pixel = [=, &map](int r) { return pixel_offset(map, x, y, image, r); };
    for_box(map, const_cast<void*>(from), channel, pixel, [](const uint16_t* place, uint16_t* to) {
      if (to) *to = *place;
    });
  });
}
inline void commit_stores() { groups_of_stores().emplace_back(); }

template <int kLeft>
void wait_for_stores_but() {
  cuda_on_cpu::pause(3);
  auto& groups = groups_of_stores();
  for (; groups.size() > kLeft + 1; groups.erase(groups.begin()))
    for (auto& store : groups.front()) store();
}

// Two clusters: they walk tiles even over small tensors.
template <typename Params>
cudaError_t clusters_at_once(int* count, void (*)(Params), unsigned, unsigned, size_t) {
  *count = 2;
  return cudaSuccess;
}

inline void arrive_at(Barrier& barrier, int rank) {
  const ptrdiff_t away = (rank - rank_in_cluster()) * shared_period;
  reinterpret_cast<Barrier*>(reinterpret_cast<uint8_t*>(&barrier) + away)->arrive();
}

inline void load_pixels_everywhere(void* to, const TileMap& map, Barrier& barrier, int channel, int x, int y, int image,
                                   int right, int down, int blocks) {
  load_pixels(to, map, barrier, channel, x, y, image, right, down, -rank_in_cluster(), blocks);
}

}  // namespace fastres::cuda::sm90
