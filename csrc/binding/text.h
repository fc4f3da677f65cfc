// A str argument of a kernel. Taken as std::string, PyTorch 2.13's conversion leaves a copy behind at every call: 48 bytes that
// are never freed (pytorch/pytorch#191340).
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace fastres {

struct Text : std::string {
  using std::string::string;
};

}  // namespace fastres

// The handle is ours to delete, as that of std::string is.
template <>
struct torch::stable::detail::ToImpl<fastres::Text> {
  template <typename... Rest>
  static fastres::Text call(StableIValue value, Rest...) {
    const auto handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    const bool known = torch_string_length(handle, &length) == AOTI_TORCH_SUCCESS &&
                       torch_string_c_str(handle, &data) == AOTI_TORCH_SUCCESS;
    fastres::Text text = known ? fastres::Text(data, length) : fastres::Text();  // which no argument may be
    torch_delete_string(handle);
    return text;
  }
};
