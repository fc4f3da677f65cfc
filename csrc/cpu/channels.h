// Per-channel values between tensors and tables: parameters and statistics of any floating dtype, in double.
#pragma once

#include <memory>
#include <new>

#include "cpu/host.h"
#include "torch/headeronly/util/BFloat16.h"
#include "torch/headeronly/util/Half.h"

namespace fastres::cpu {

// Memory for tables and partial sums, aligned to a cache line.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    constexpr std::align_val_t kAlign{64};
    blocks_.emplace_back(::operator new(count * sizeof(T), kAlign), [](void* p) { ::operator delete(p, kAlign); });
    return static_cast<T*>(blocks_.back().get());
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

// Calls f with a pointer of the right type to the data of t.
template <typename F>
void with_data(void* data, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Double: return f(static_cast<double*>(data));
    case ScalarType::Half: return f(static_cast<torch::headeronly::Half*>(data));
    case ScalarType::BFloat16: return f(static_cast<torch::headeronly::BFloat16*>(data));
    default: return f(static_cast<float*>(data));
  }
}

// One value per channel, in double.
using Channels = std::vector<double>;

inline Channels read_channels(void* data, ScalarType dtype, int64_t count, int64_t stride) {
  Channels values(count);
  with_data(data, dtype, [&](const auto* p) {
    for (int64_t c = 0; c < count; ++c) values[c] = static_cast<double>(p[c * stride]);
  });
  return values;
}

inline Channels read_channels(const char* op, const char* param, const Tensor& t, const Tensor& x) {
  check_cpu(op, param, t);
  check_floating(op, param, t, true);
  FASTRES_CHECK(t.dim() == 1 && t.size(0) == x.size(1), op, param, "of size (" << x.size(1) << ",), x's channels",
                show(t.sizes()));
  return read_channels(t.data_ptr(), t.scalar_type(), t.size(0), t.stride(0));
}

inline Tensor write_channels(const Channels& values, ScalarType dtype, const Tensor& x) {
  Tensor out = empty_vector(static_cast<int64_t>(values.size()), dtype, x);
  with_data(out.data_ptr(), dtype, [&](auto* p) {
    for (size_t c = 0; c < values.size(); ++c) p[c] = static_cast<std::remove_pointer_t<decltype(p)>>(values[c]);
  });
  return out;
}

}  // namespace fastres::cpu
