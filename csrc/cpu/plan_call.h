// What the steps of a plan share: the tensors of a call, the places of values, the checks of geometry.
#pragma once

#include "cpu/conv_host.h"
#include "cpu/plan.h"
#include "cpu/plan_int8.h"

namespace fastres::cpu {

constexpr const char* kPlan = "freeze";

// The tensors of one call, and the part of its images that some threads work on: the first image, an arena of its own.
struct Call {
  const Tensor& x;
  const std::vector<Tensor>& constants;
  const std::vector<Tensor>& ys;
  int64_t image;
  char* arena;
  int64_t arena_bytes, threads;
  DType dtype;  // of ys, and of all values but those of 8-bit integers; x may be float32 where it is bfloat16
  int64_t size;  // bytes of an element of dtype
  std::atomic<bool>& finite;  // made false where images that are quantised are not

  // The address of a value's first image, once `bytes` of it are known to exist.
  char* at(const Place& place, int64_t first, int64_t images, int64_t image_bytes) const {
    const int64_t output = place.offset <= kOutput ? kOutput - place.offset : -1, outputs = static_cast<int64_t>(ys.size());
    const int64_t begin = (first + (output >= 0 ? image : 0)) * place.step, end = begin + images * image_bytes;
    FASTRES_CHECK(place.step == 0 || place.step == image_bytes, kPlan, "a value", "of images without gaps", place.step);
    if (output >= 0) {
      FASTRES_CHECK(output < outputs && end <= ys[output].numel() * size, kPlan, "an output", "large enough for its step", output);
      return static_cast<char*>(ys[output].data_ptr()) + begin;
    }
    FASTRES_CHECK(place.offset >= 0 && place.offset + end <= arena_bytes, kPlan, "a step's value", "within the arena",
                  place.offset);
    return arena + place.offset + begin;
  }

  const Tensor& constant(int64_t index) const {
    FASTRES_CHECK(index >= 0 && index < static_cast<int64_t>(constants.size()), kPlan, "a step's constant", "one of the call",
                  index);
    return constants[index];
  }
};

// What a copy reads: every stride-th pixel of the input, whatever its strides, or of a value. Steps in elements.
struct PadSource {
  const char* x;
  int64_t image_step, channel_step, row_step, pixel_step;

  PadSource(const Call& call, const PlanRow& row, int64_t first, int64_t images, int64_t value_size) {
    const int64_t c = row.channels;
    FASTRES_CHECK(row.out_channels >= c && row.pad_h >= 0 && row.pad_w >= 0 && row.stride_h >= 1 && row.stride_w >= 1 &&
                      (row.out_h - 1) * row.stride_h < row.height && (row.out_w - 1) * row.stride_w < row.width,
                  kPlan, "a copy", "within its image", row.out_channels);
    if (row.x.offset == kInput) {
      const Tensor& input = call.x;
      FASTRES_CHECK(input.size(1) == c && input.size(2) == row.height && input.size(3) == row.width, kPlan, "the input",
                    "as planned", show(input.sizes()));
      x = static_cast<const char*>(input.data_ptr()) + (call.image + first) * input.stride(0) * element_size(dtype_of(input));
      image_step = input.stride(0), channel_step = input.stride(1), row_step = input.stride(2), pixel_step = input.stride(3);
    } else {
      image_step = row.height * row.width * c, channel_step = 1, row_step = row.width * c, pixel_step = c;
      x = call.at(row.x, first, images, image_step * value_size);
    }
    row_step *= row.stride_h, pixel_step *= row.stride_w;
  }
};

// Elements of an image that a copy writes.
inline int64_t padded_elements(const PlanRow& row) {
  return (row.out_h + 2 * row.pad_h) * (row.out_w + 2 * row.pad_w) * row.out_channels;
}

// Images converted on their way into the arena.
inline Work image_work(const Call& call, const PlanRow& row, const PadSource& source, void* y, int64_t images, bool quantized,
                       float scale, float zero) {
  const ImageArgs args{quantized, reinterpret_cast<const float*>(source.x), y, images, row.channels, row.out_h, row.out_w,
                       source.image_step, source.channel_step, source.row_step, source.pixel_step, row.out_channels, row.pad_h,
                       row.pad_w, scale, zero, &call.finite};
  return {images * (row.out_h + 2 * row.pad_h), std::max<int64_t>(1, kGrain / (row.out_w * row.out_channels)),
          [args](int64_t begin, int64_t end) { convert_images(args, begin, end); }};
}

// A convolution of values of `size` bytes, but for its weights and bias; the output's may be of another.
inline ConvArgs conv_args(const Call& call, const PlanRow& row, int64_t first, int64_t images, int64_t size, int64_t y_size) {
  const int64_t pixel_step = row.channels * size, image_step = row.height * row.width * pixel_step;
  const int64_t reach_w = (row.out_w - 1) * row.stride_w * pixel_step + row.run * kWordBytes;
  FASTRES_CHECK(row.run > 0 && row.run <= kConvMostRun && row.groups >= 1 && row.groups <= row.channels && row.kernel_w >= 1 &&
                    row.kernel_h >= 1 && row.stride_h >= 1 && row.stride_w >= 1 && row.dilation_h >= 1 && row.dilation_w >= 1 &&
                    (row.run * row.groups * kWordBytes == pixel_step ||
                     (row.groups == 1 && row.pad_w == 0 && row.kernel_w == 1 && reach_w <= row.width * pixel_step)),
                kPlan, "a convolution's taps", "within its pixels", row.run);
  const int64_t y_numel = row.out_h * row.out_w * row.out_channels;
  const bool added = row.residual.offset != kNone;
  return {.dtype = call.dtype, .act = row.relu ? Act::kRelu : Act::kNone, .stream = false,
          .x = call.at(row.x, first, images, image_step), .weight = nullptr, .bias = nullptr,
          .residual = added ? call.at(row.residual, first, images, y_numel * size) : nullptr,
          .y = call.at(row.y, first, images, y_numel * y_size), .images = images, .height = row.height, .width = row.width,
          .image_step = image_step, .row_step = row.width * pixel_step, .pixel_step = pixel_step, .out_h = row.out_h,
          .out_w = row.out_w, .out_channels = row.out_channels, .out_step = row.out_channels, .kernel_h = row.kernel_h,
          .kernel_w = row.kernel_w, .stride_h = row.stride_h, .stride_w = row.stride_w, .pad_h = row.pad_h, .pad_w = row.pad_w,
          .dilation_h = row.dilation_h, .dilation_w = row.dilation_w, .run = row.run, .dense = false,
          .share_channels = false, .block = 0};
}

inline void check_windows(const PlanRow& row) {
  FASTRES_CHECK(row.stride_h >= 1 && row.stride_w >= 1 && row.pad_h < row.kernel_h && row.pad_w < row.kernel_w &&
                    (row.out_h - 1) * row.stride_h - row.pad_h < row.height &&
                    (row.out_w - 1) * row.stride_w - row.pad_w < row.width,
                kPlan, "a window", "one that touches its image", row.kernel_h);
}

Work int8_work(const Call& call, const PlanRow& row, int64_t first, int64_t images);

}  // namespace fastres::cpu
