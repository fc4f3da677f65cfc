// What the bindings of the batch-norm ops share.
#pragma once

#include "cuda/bn_act_backward.h"
#include "cuda/bn_statistics.h"
#include "cuda/host.h"

namespace fastres::cuda {

// A per-channel parameter as the kernels take it, and what keeps its memory alive.
struct ChannelArgument {
  OptionalTensor tensor;

  ChannelArgument(const char* op, const char* param, const OptionalTensor& t, const Tensor& x) {
    if (t) tensor = channel_vector(op, param, *t, x, t->scalar_type());
  }

  operator ChannelVector() const {
    return tensor ? ChannelVector{tensor->data_ptr(), dtype_of(*tensor)} : ChannelVector{nullptr, DType::kFloat32};
  }
};

// The parameters of a normalisation.
struct BnArguments {
  ChannelArgument weight, bias, mean, var;

  BnArguments(ChannelArgument weight, ChannelArgument bias, ChannelArgument mean, ChannelArgument var)
      : weight(std::move(weight)), bias(std::move(bias)), mean(std::move(mean)), var(std::move(var)) {}

  BnArguments(const char* op, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
              const OptionalTensor& mean, const OptionalTensor& var)
      : weight(op, "weight", weight, x), bias(op, "bias", bias, x), mean(op, "mean", mean, x), var(op, "var", var, x) {}
};

inline int vector_of(const Tensor& x) { return 16 / static_cast<int>(element_size(dtype_of(x))); }

// Checks the activations, x first, and divides x among blocks, `vec` elements at a time; vectors need all of them aligned.
inline BnGeometry divide(const char* op, std::initializer_list<Named> activations, int vec = 0) {
  const Tensor& x = activations.begin()->tensor;
  check_cuda(op, activations.begin()->param, x);
  const bool channels_last = check_activations(op, activations, false) == Format::channels_last;
  const bool aligned =
      std::all_of(activations.begin(), activations.end(), [](const Named& a) { return is_aligned(a.tensor.data_ptr()); });
  if (vec == 0) vec = vector_of(x);
  return bn_geometry(vec, channels_last, aligned, x.size(0), x.size(1), x.size(2) * x.size(3));
}

// How a pass that writes a ReLU's mask beside y divides x: by bytes of the mask where it can.
inline BnGeometry divide_masked(const char* op, std::initializer_list<Named> activations) {
  const BnGeometry geometry = divide(op, activations, kMaskVec);
  return geometry.vec == kMaskVec ? geometry : divide(op, activations);
}

inline Tensor empty_mask(const Tensor& x, bool relu) {
  return empty_vector(relu ? (x.numel() + 7) / 8 : 0, ScalarType::Byte, x);
}

// A mask as kernels read it and write it; null without a ReLU.
inline uint8_t* mask_data(const Tensor& mask, bool relu) { return relu ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr; }

inline void check_mask(const char* op, const Tensor& mask, const Tensor& x, bool relu) {
  check_cuda(op, "mask", mask);
  FASTRES_CHECK(mask.get_device_index() == x.get_device_index(), op, "mask", "on the device of x, " << show_device(x),
                show_device(mask));
  fastres::check_mask(op, mask, relu ? x.numel() : 0);
}

inline Tensor empty_like_activation(const Tensor& x) { return empty_activation(x.sizes(), memory_format(x), x); }

struct Statistics {
  Tensor mean, var;
};

inline Statistics batch_statistics(const Launch& launch, const BnGeometry& geometry, const Tensor& x) {
  Statistics out{empty_vector(x.size(1), ScalarType::Float, x), empty_vector(x.size(1), ScalarType::Float, x)};
  const Tensor partial = empty_vector(geometry.partials(), ScalarType::Float, x);
  launch(launch_bn_statistics,
         BnStatisticsParams{geometry, dtype_of(x), x.data_ptr(), static_cast<float*>(partial.data_ptr()),
                            static_cast<float*>(out.mean.data_ptr()), static_cast<float*>(out.var.data_ptr())});
  return out;
}

// The outputs of a backward, and the workspaces that must live until it is launched.
struct Gradients {
  Tensor x, weight, bias, partial, correction;
};

// Completes the params of a backward, which hold what differs between the ops. grad_weight has the dtype of weight, else of
// mean; grad_bias that of bias, else of grad_weight.
inline Gradients prepare_gradients(BnActBackwardParams& params, const Tensor& x, const BnArguments& args) {
  const Tensor& typed_weight = args.weight.tensor ? *args.weight.tensor : *args.mean.tensor;
  const Tensor& typed_bias = args.bias.tensor ? *args.bias.tensor : typed_weight;
  Gradients out{empty_like_activation(x), empty_vector(x.size(1), typed_weight.scalar_type(), x),
                empty_vector(x.size(1), typed_bias.scalar_type(), x),
                empty_vector(params.geometry.partials(), ScalarType::Float, x),
                empty_vector(2 * x.size(1), ScalarType::Float, x)};
  params.dtype = dtype_of(x);
  params.x = x.data_ptr();
  params.grad_x = out.x.data_ptr();
  params.weight = args.weight;
  params.bias = args.bias;
  params.mean = args.mean;
  params.var = args.var;
  params.grad_weight = out.weight.data_ptr();
  params.grad_bias = out.bias.data_ptr();
  params.grad_weight_dtype = dtype_of(out.weight);
  params.grad_bias_dtype = dtype_of(out.bias);
  params.partial = static_cast<float*>(out.partial.data_ptr());
  params.correction = static_cast<float*>(out.correction.data_ptr());
  return out;
}

}  // namespace fastres::cuda
