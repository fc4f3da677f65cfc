// What every CUDA binding needs between its checks and its launch.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding/check.h"
#include "common/types.h"

namespace fastres::cuda {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: return DType::kFloat32;
  }
}

// Makes the device of x current for its lifetime, for allocations and the launch, which go to the current stream.
class Launch {
 public:
  Launch(const char* op, const Tensor& x) : op_(op), guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename Params>
  void operator()(cudaError_t (*launcher)(const Params&, cudaStream_t), const Params& params) const {
    const cudaError_t status = launcher(params, stream_);
    FASTRES_CHECK(status == cudaSuccess, op_, "the launch", "accepted by CUDA", cudaGetErrorString(status));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace fastres::cuda
