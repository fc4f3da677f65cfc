// In the place of csrc/cuda/device/sm90.cuh: the same names, done by fibers. Copies and products happen when they are issued
// or as late as they may, by turns, so that what is read before its wait, or overwritten before its release, is wrong.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "common/types.h"
#include "cuda/conv_bn_act.h"
#include "cuda/device/mma.cuh"

namespace fastres::cuda::sm90 {

constexpr int kRowBytes = 128;

// The 16-byte parts of a row of 128 bytes in the order that the row's number gives.
inline uintptr_t swizzled(uintptr_t address) { return address ^ ((address >> 7 & 7) << 4); }

struct TileMap {
  uint16_t* base;
  int64_t rows, taps, columns;  // of a matrix
  Images x;                     // of images under a window
  Window window;
  int box_rows;
};

inline cudaError_t make_tile_map(TileMap* map, DType, const void* base, int64_t rows, int64_t taps, int64_t columns,
                                 int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || columns % 8 || box_rows > 256) return cudaErrorInvalidValue;
  *map = {static_cast<uint16_t*>(const_cast<void*>(base)), rows, taps, columns, {}, {}, box_rows};
  return cudaSuccess;
}

inline cudaError_t make_image_map(TileMap* map, DType, const void* base, const Images& x, const Window& window, int pixels) {
  if (reinterpret_cast<uintptr_t>(base) % 16 || x.channels % 8 || pixels > 1024) return cudaErrorInvalidValue;
  for (const Span& s : {window.h, window.w})
    if (s.stride > 8 || s.padding > 128 || s.last() < -128 || s.last() > 127) return cudaErrorInvalidValue;
  *map = {static_cast<uint16_t*>(const_cast<void*>(base)), 0, 0, x.channels, x, window, pixels};
  return cudaSuccess;
}

// Each block of a cluster has its own, so many bytes after that of the one before.
inline ptrdiff_t shared_period;
template <typename T>
T& shared_memory() {
  struct alignas(1024) Memory {
    T memory;
  };
  static Memory of[8];
  shared_period = sizeof(Memory);
  return of[cuda_on_cpu::rank()].memory;
}

struct Barrier {
  int arrivals, missing, bytes, phase;

  void init(int count) { *this = {count, count, 0, 0}; }
  void arrive() { step(1, 0); }
  void arrive_and_expect(int count) { step(1, -count); }
  void arrived(int count) { step(0, count); }
  void wait(int parity) {
    cuda_on_cpu::wait_until([=, this] { return phase != parity; });
  }

 private:
  void step(int arrived, int more) {
    missing -= arrived;
    bytes += more;
    if (missing < 0) throw std::runtime_error("more arrivals at a barrier than its phase takes");
    if (missing > 0 || bytes != 0) return;
    missing = arrivals;
    phase ^= 1;
  }
};

template <typename Params>
cudaError_t launch_behind(void (*kernel)(Params), dim3 grid, dim3 block, const Params& params, size_t, cudaStream_t) {
  return cuda_on_cpu::run(grid, block, [&] { kernel(params); });
}

inline void wait_for_kernel_before() {}
inline void let_next_kernel_begin() {}
inline void publish_barriers() {}
inline void prefetch(const TileMap&) {}
inline void publish_shared() {}
template <int>
void give_up_registers() {}
template <int>
void take_registers() {}

// Calls f with an element's place in shared memory and in the tensor, null where it lies beyond the edge; row(r) is the
// offset of the first column of row r of the box, negative beyond the edge.
template <typename Row, typename F>
void for_box(const TileMap& map, void* shared, int column, Row row, F f) {
  for (int r = 0; r < map.box_rows; ++r) {
    const int64_t offset = row(r);
    for (int c = 0; c < kRowBytes / 2; ++c) {
      auto* place = reinterpret_cast<uint16_t*>(swizzled(reinterpret_cast<uintptr_t>(shared) + r * kRowBytes + 2 * c));
      f(place, offset >= 0 && column + c < map.columns ? map.base + offset + column + c : nullptr);
    }
  }
}

// In the shared memories of so many blocks of the cluster, `first` the first of them, relative to this one.
template <typename Row>
void load_box(void* to, const TileMap& map, Barrier& barrier, int column, Row row, int first = 0, int blocks = 1) {
  for (int block = first; block < first + blocks; ++block) {
    const ptrdiff_t away = block * shared_period;
    cuda_on_cpu::beside([=, &barrier, &map] {
      for_box(map, static_cast<uint8_t*>(to) + away, column, row,
              [](uint16_t* place, const uint16_t* from) { *place = from ? *from : 0; });
      reinterpret_cast<Barrier*>(reinterpret_cast<uint8_t*>(&barrier) + away)->arrived(map.box_rows * kRowBytes);
    });
  }
}

inline int64_t row_offset(const TileMap& map, int tap, int64_t row) {
  return tap < map.taps && row < map.rows ? (row * map.taps + tap) * map.columns : -1;
}

inline void load_tile(void* to, const TileMap& map, Barrier& barrier, int column, int tap, int row) {
  load_box(to, map, barrier, column, [=, &map](int r) { return row_offset(map, tap, row + r); });
}

// The window's first tap goes along a line between the corners, then to the next line, then to the next image: where the pixel
// lies that is so many after one, shifted; negative outside of the images.
inline int64_t pixel_offset(const TileMap& map, int x, int y, int image, int after, int right = 0, int down = 0) {
  const Span &h = map.window.h, &w = map.window.w;
  const int along = (x + w.padding) / w.stride + after, line = (y + h.padding) / h.stride + along / w.out(map.x.width);
  const int column = along % w.out(map.x.width) * w.stride - w.padding + right;
  const int row = line % h.out(map.x.height) * h.stride - h.padding + down, n = image + line / h.out(map.x.height);
  const bool inside = column >= 0 && column < map.x.width && row >= 0 && row < map.x.height && n < map.x.count;
  return inside ? ((int64_t{n} * map.x.height + row) * map.x.width + column) * map.x.channels : -1;
}

inline void load_pixels(void* to, const TileMap& map, Barrier& barrier, int channel, int x, int y, int image, int right,
                        int down, int first = 0, int blocks = 1) {
  const auto pixel = [=, &map](int r) { return pixel_offset(map, x, y, image, r, right, down); };
  load_box(to, map, barrier, channel, pixel, first, blocks);
}

inline std::vector<std::function<void()>>& stores() {
  static std::vector<std::function<void()>> waiting;
  return waiting;
}

inline void store_tile(const TileMap& map, const void* from, int column, int row) {
  stores().push_back([=, &map] {
    const auto offset = [&](int r) { return row_offset(map, 0, row + r); };
    for_box(map, const_cast<void*>(from), column, offset, [](const uint16_t* place, uint16_t* to) {
      if (to) *to = *place;
    });
  });
}

// Other threads run on before the stores read: the buffer is theirs only once this one says so.
inline void wait_for_stores() {
  cuda_on_cpu::pause(3);
  for (auto& store : stores()) store();
  stores().clear();
}

inline uint64_t operand(const void* p) { return reinterpret_cast<uint64_t>(p); }

// The products that each thread has issued, in groups.
struct Products {
  std::vector<std::function<void()>> issued;
  std::vector<std::vector<std::function<void()>>> groups;
};
inline Products& products() {
  static Products of[cuda_on_cpu::kMaxFibers];
  return of[cuda_on_cpu::fiber()];
}

inline void begin_products() {}
inline void commit_products() { products().groups.push_back(std::move(products().issued)), products().issued.clear(); }

template <int kLeft>
void wait_for_products() {
  auto& groups = products().groups;
  for (; groups.size() > kLeft; groups.erase(groups.begin()))
    for (auto& product : groups.front()) product();
}

template <int kCount>
void pin(float (&)[kCount]) {}

// The 16 values of a row of an operand.
template <typename T>
struct Row {
  float of[16];

  Row(uint64_t operand, int row) {
    uint16_t bits[16];
    for (int k : {0, 8}) memcpy(bits + k, reinterpret_cast<const void*>(swizzled(operand + row * kRowBytes + 2 * k)), 16);
    for (int k = 0; k < 16; ++k) of[k] = value_of<T>(bits[k]);
  }
};

template <typename T, int kCount>
void product(float (&acc)[kCount], uint64_t a, uint64_t b, int accumulate) {
  if (a % 16 || b % 16) throw std::runtime_error("an operand that is not aligned to 16 bytes");
  products().issued.push_back([&acc, a, b, accumulate, thread = threadIdx.x % 128] {
    const int row = 16 * (thread / 32) + thread % 32 / 4;
    const Row<T> rows[] = {{a, row}, {a, row + 8}};
    for (int i = 0; i < kCount; i += 4) {
      for (int k = 0; k < 2; ++k) {
        const Row<T> column(b, 2 * i + 2 * (thread % 4) + k);
        float sums[] = {accumulate ? acc[i + k] : 0.0f, accumulate ? acc[i + 2 + k] : 0.0f};
        for (int j = 0; j < 16; ++j) sums[0] += rows[0].of[j] * column.of[j], sums[1] += rows[1].of[j] * column.of[j];
        acc[i + k] = sums[0], acc[i + 2 + k] = sums[1];
      }
    }
  });
}

}  // namespace fastres::cuda::sm90
