// What every binding needs around its kernel: the checks that keep memory safe, and outputs in the layout fastres promises.
// The Python side explains arguments to people; these checks hold for any caller of the private ops.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "binding/text.h"

// Throws `fastres.<op>: <param> must be <must>, got <got>`; must and got may be any streamable expression.
#define FASTRES_CHECK(cond, op, param, must, got)                                                    \
  do {                                                                                               \
    if (!(cond)) [[unlikely]] {                                                                      \
      std::ostringstream text_;                                                                      \
      text_ << "fastres." << (op) << ": " << (param) << " must be " << must << ", got " << got;      \
      throw std::runtime_error(text_.str());                                                         \
    }                                                                                                \
  } while (false)

namespace fastres {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string show(IntHeaderOnlyArrayRef values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i ? ", " : "") << values[i];
  text << (values.size() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string show(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    default: return torch::headeronly::toString(dtype);
  }
}

inline bool same(IntHeaderOnlyArrayRef a, IntHeaderOnlyArrayRef b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline std::string show_device(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  if (t.is_cuda()) return "cuda:" + std::to_string(t.get_device_index());
  return "another device";
}

// --- single facts --------------------------------------------------------------------------------

inline void check_cpu(const char* op, const char* param, const Tensor& t) {
  FASTRES_CHECK(t.is_cpu(), op, param, "on cpu", show_device(t));
}

inline void check_cuda(const char* op, const char* param, const Tensor& t) {
  FASTRES_CHECK(t.is_cuda(), op, param, "on a CUDA device", show_device(t));
}

// The same device, dtype and sizes as x: what every activation that travels with x must have.
inline void check_like(const char* op, const char* param, const Tensor& t, const Tensor& x) {
  FASTRES_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, param,
                "on the device of x, " << show_device(x), show_device(t));
  FASTRES_CHECK(t.scalar_type() == x.scalar_type(), op, param, "of the dtype of x, " << show(x.scalar_type()),
                show(t.scalar_type()));
  FASTRES_CHECK(same(t.sizes(), x.sizes()), op, param, "of the sizes of x, " << show(x.sizes()), show(t.sizes()));
}

inline bool is_floating(ScalarType dtype, bool with_double) {
  return dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ||
         (with_double && dtype == ScalarType::Double);
}

// float32, float16, bfloat16 and, where with_double, float64.
inline void check_floating(const char* op, const char* param, const Tensor& t, bool with_double) {
  FASTRES_CHECK(is_floating(t.scalar_type(), with_double), op, param,
                (with_double ? "float32, float16, bfloat16 or float64" : "float32, float16 or bfloat16"),
                show(t.scalar_type()));
}

// "relu" or "none": whether to apply the ReLU.
inline bool is_relu(const char* op, const std::string& act) {
  FASTRES_CHECK(act == "relu" || act == "none", op, "act", "'relu' or 'none'", "'" << act << "'");
  return act == "relu";
}

// The type in which x is accumulated, and in which its statistics are returned.
inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// --- layout --------------------------------------------------------------------------------------

enum class Format { contiguous, channels_last };

inline std::vector<int64_t> format_strides(IntHeaderOnlyArrayRef sizes, Format format) {
  std::vector<int64_t> strides(sizes.size());
  const std::array<size_t, 4> channels_last{1, 3, 2, 0};  // dimensions, innermost first
  int64_t step = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const size_t d = format == Format::channels_last ? channels_last[i] : sizes.size() - 1 - i;
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

// Whether t is dense in the format; as in torch, the stride of a dimension of size 1 says nothing.
inline bool is_dense(const Tensor& t, Format format) {
  const std::vector<int64_t> expected = format_strides(t.sizes(), format);
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.sizes()[d] != 1 && t.strides()[d] != expected[d]) return false;
  return true;
}

// The rule for activation outputs: contiguous where x is; else channels_last where x's channels are adjacent; else contiguous.
inline Format memory_format(const Tensor& x) {
  return !x.is_contiguous() && x.stride(1) == 1 && x.size(1) > 1 ? Format::channels_last : Format::contiguous;
}

struct Named {
  const char* param;
  const Tensor& tensor;
};

// The activations of an op, x first: four dimensions, not empty, alike, and all dense in the one format returned.
inline Format check_activations(const char* op, std::initializer_list<Named> activations, bool with_double) {
  const Named& first = *activations.begin();
  const Tensor& x = first.tensor;
  FASTRES_CHECK(x.dim() == 4, op, first.param, "of 4 dimensions (N, C, H, W)", show(x.sizes()));
  FASTRES_CHECK(x.numel() > 0, op, first.param, "not empty", show(x.sizes()));
  check_floating(op, first.param, x, with_double);
  const Format format = memory_format(x);
  for (const auto& [param, tensor] : activations) {
    check_like(op, param, tensor, x);
    FASTRES_CHECK(is_dense(tensor, format), op, param,
                  (format == Format::contiguous ? "dense and contiguous" : "dense and channels_last"),
                  "strides " << show(tensor.strides()) << " for sizes " << show(tensor.sizes()));
  }
  return format;
}

// Whether t fills one block of memory with no gap and no overlap, in any order of its dimensions.
inline bool is_non_overlapping_and_dense(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.sizes()[d] != 1) dims.emplace_back(t.strides()[d], t.sizes()[d]);
  std::sort(dims.begin(), dims.end());
  int64_t step = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != step) return false;
    step *= size;
  }
  return true;
}

// Two operands of any rank that lie alike in memory, without gap or overlap.
inline void check_pair(const char* op, Named first, Named second, bool with_double) {
  const Tensor &a = first.tensor, &b = second.tensor;
  check_floating(op, first.param, a, with_double);
  FASTRES_CHECK(a.numel() > 0, op, first.param, "not empty", show(a.sizes()));
  check_like(op, second.param, b, a);
  for (int64_t d = 0; d < a.dim(); ++d)
    FASTRES_CHECK(a.sizes()[d] == 1 || a.strides()[d] == b.strides()[d], op, second.param,
                  "of the strides of " << first.param << ", " << show(a.strides()), show(b.strides()));
  FASTRES_CHECK(is_non_overlapping_and_dense(a), op, first.param, "dense and without overlap",
                "strides " << show(a.strides()) << " for sizes " << show(a.sizes()));
}

// One bit for each of `numel` elements.
inline void check_mask(const char* op, const Tensor& mask, int64_t numel) {
  FASTRES_CHECK(mask.scalar_type() == ScalarType::Byte, op, "mask", "uint8", show(mask.scalar_type()));
  FASTRES_CHECK(mask.dim() == 1 && mask.size(0) == (numel + 7) / 8 && mask.is_contiguous(), op, "mask",
                "contiguous and of size (" << (numel + 7) / 8 << ",), a bit an element", show(mask.sizes()));
}

// --- parameters and statistics -------------------------------------------------------------------

// A vector with one value per channel of x, contiguous and of the wanted dtype (a copy only where it is neither).
inline Tensor channel_vector(const char* op, const char* param, const Tensor& t, const Tensor& x, ScalarType dtype) {
  FASTRES_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, param,
                "on the device of x, " << show_device(x), show_device(t));
  FASTRES_CHECK(t.dim() == 1 && t.size(0) == x.size(1), op, param, "of size (" << x.size(1) << ",), x's channels",
                show(t.sizes()));
  check_floating(op, param, t, true);
  const Tensor cast = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

inline OptionalTensor channel_vector(const char* op, const char* param, const OptionalTensor& t, const Tensor& x,
                                     ScalarType dtype) {
  return t ? OptionalTensor(channel_vector(op, param, *t, x, dtype)) : std::nullopt;
}

// --- outputs -------------------------------------------------------------------------------------

// Uninitialised, on x's device. Calls the shim directly: several times cheaper than through the dispatcher.
inline Tensor empty_strided(IntHeaderOnlyArrayRef sizes, IntHeaderOnlyArrayRef strides, ScalarType dtype,
                            const Tensor& x) {
  AtenTensorHandle handle = nullptr;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device_type));
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type,
                               x.get_device_index(), &handle) != TORCH_SUCCESS)
    // The words by which programs know that memory ran out; the shim keeps PyTorch's own to itself.
    throw std::runtime_error(std::string("fastres: ") +
                             (x.is_cpu() ? "DefaultCPUAllocator: can't allocate memory" : "CUDA out of memory.") +
                             " for a tensor of shape " + show(sizes));
  return Tensor(handle);
}

inline Tensor empty_activation(IntHeaderOnlyArrayRef sizes, Format format, const Tensor& x) {
  return empty_strided(sizes, format_strides(sizes, format), x.scalar_type(), x);
}

// An output of x's sizes and strides; x must be dense.
inline Tensor empty_like_strided(const Tensor& x) {
  return empty_strided(x.sizes(), x.strides(), x.scalar_type(), x);
}

inline Tensor empty_vector(int64_t size, ScalarType dtype, const Tensor& x) {
  return empty_strided({&size, 1}, std::array<int64_t, 1>{1}, dtype, x);
}

using torch::stable::parallel_for;  // parallel_for(begin, end, grain, [&](int64_t begin, int64_t end) { ... })

}  // namespace fastres
