// The Python extension module fastres._C. Loading it also registers the CPU ops, whose bindings are linked into it;
// tensors never cross pybind11.
#include <pybind11/pybind11.h>

#include "cpu/level.h"

namespace {

// What was built, as JSON: written by setup.py just before this file is compiled.
constexpr const char* kBuildInfo =
#include "build_info.inc"
    ;

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU kernels of fastres.";
  m.def(
      "build_info", [] { return pybind11::module_::import("json").attr("loads")(kBuildInfo); },
      "What was built, with what, and why the rest was not, as a dict.");
  m.def(
      "cpu_features",
      [] {
        using pybind11::literals::operator""_a;
        return pybind11::dict("level"_a = fastres::cpu::cpu_level(), "bf16_dot"_a = fastres::cpu::has_bf16_dot(),
                              "int8_dot"_a = fastres::cpu::has_int8_dot());
      },
      "The x86-64 level whose kernels run here, and whether the processor multiplies pairs of bfloat16.");
}
