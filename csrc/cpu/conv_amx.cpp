// Binding of a training step's convolution, and of its input gradient, in tile registers: weights packed at every call.
#include <array>
#include <atomic>

#include "cpu/channels.h"
#include "cpu/conv_host.h"
#include "cpu/conv_window.h"

namespace fastres::cpu {
namespace {

// Every step-th tap of a side from a first one on, so many of them.
struct Taps {
  int64_t first, step, count;
};

// Adds to `works` the convolution of x with some taps of the weight, as far as `args` says; its memory is kept in `scratch`.
// pad_h and pad_w may be negative: the first window then begins inside x.
void convolve(const Tensor& x, const Tensor& weight, bool turned, const std::array<Taps, 2>& taps, ConvArgs args,
              std::atomic<bool>* finite, Scratch& scratch, std::vector<Work>& works) {
  const int64_t height = x.size(2), width = x.size(3), pixel = x.size(1) * 2;
  args.dtype = DType::kBFloat16, args.act = Act::kNone, args.x = x.data_ptr(), args.images = x.size(0);
  args.height = height, args.width = width, args.image_step = height * width * pixel, args.row_step = width * pixel;
  args.pixel_step = pixel, args.run = pixel / kWordBytes, args.out_step = args.out_channels;
  args.kernel_h = taps[0].count, args.kernel_w = taps[1].count;
  auto* packed = scratch.take<float>(packed_words(args.out_channels, conv_depth(args)));
  auto* bias = scratch.take<float>(args.out_channels);
  std::fill_n(bias, args.out_channels, 0.0f);
  args.weight = packed, args.bias = bias;
  const ConvAmxPackArgs pack{.weight = weight.data_ptr(), .packed = packed, .out_channels = weight.size(0),
                             .channels = weight.size(1), .kernel_h = weight.size(2), .kernel_w = weight.size(3), .turned = turned,
                             .first_h = taps[0].first, .first_w = taps[1].first, .step_h = taps[0].step, .step_w = taps[1].step,
                             .taps_h = taps[0].count, .taps_w = taps[1].count, .finite = finite};
  works.push_back({conv_amx_pack_units(pack), 1, [pack](int64_t begin, int64_t end) { conv_amx_pack(pack, begin, end); }});
  works.push_back(shared_out(args, torch::stable::get_num_threads(), conv_bn_act_amx, amx_cost));
}

void check_weight(const char* op, const Tensor& weight, const char* of, int64_t dim, int64_t channels) {
  check_amx_operand(op, "weight", weight);
  FASTRES_CHECK(weight.size(0) % 16 == 0 && weight.size(dim) == channels, op, "weight",
                "for " << of << "'s " << channels << " channels, the others in multiples of 16", show(weight.sizes()));
}

// conv2d(x, weight, stride, padding, dilation); the weights dense in channels_last. Empty where some weight is not finite.
Tensor conv_amx(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const char* op = "conv";
  check_amx_operand(op, "x", x);
  check_weight(op, weight, "x", 1, x.size(1));
  const ConvWindow window{{weight.size(2), weight.size(3)}, stride, padding, dilation};
  const Shape shape = output_shape(op, window, shape_of(x), weight.size(0));
  Tensor y = empty_output(shape, Format::channels_last, x);
  std::atomic<bool> finite{true};
  Scratch scratch;
  std::vector<Work> works;
  ConvArgs args{};
  args.y = y.data_ptr(), args.out_h = shape[2], args.out_w = shape[3], args.out_channels = shape[1];
  args.stride_h = stride[0], args.stride_w = stride[1], args.pad_h = padding[0], args.pad_w = padding[1];
  args.dilation_h = dilation[0], args.dilation_w = dilation[1];
  convolve(x, weight, false, {Taps{0, 1, weight.size(2)}, Taps{0, 1, weight.size(3)}}, args, &finite, scratch, works);
  run_team(works);
  return finite ? y : empty_vector(0, ScalarType::Float, x);
}

// The taps that meet the pixels of a phase: with a stride, each phase of x has its own.
Taps taps_of(const ConvSide& side, int64_t phase) {
  Taps taps{0, side.stride, 0};
  for (int64_t tap = side.taps - 1; tap >= 0; --tap)
    if (side.phase(tap) == phase) taps.first = tap, ++taps.count;
  if (side.stride == 1) taps.step = 1;
  return taps;
}

// Where a phase's pixels go: every stride-th of a gradient's. Null `from`: zeros.
struct SpreadArgs {
  const char* from;
  char* to;
  int64_t rows, cols, height, stride_h, stride_w, row_bytes, pixel_bytes;  // height: rows of an image of the gradient
};

void spread(const SpreadArgs& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    char* to = args.to + (at / args.rows * args.height + at % args.rows * args.stride_h) * args.row_bytes;
    for (int64_t col = 0; col < args.cols; ++col, to += args.stride_w * args.pixel_bytes) {
      if (args.from == nullptr) std::memset(to, 0, args.pixel_bytes);
      else std::memcpy(to, args.from + (at * args.cols + col) * args.pixel_bytes, args.pixel_bytes);
    }
  }
}

// The gradient of that convolution's x, of so many rows and columns: for each phase of x's pixels the convolution of grad_y with
// the taps that meet it, reversed. Empty where some weight is not finite.
Tensor conv_amx_input(const Tensor& grad_y, const Tensor& weight, const Ints& size, const Ints& stride, const Ints& padding,
                      const Ints& dilation) {
  const char* op = "conv_backward_input";
  check_amx_operand(op, "grad_y", grad_y);
  check_weight(op, weight, "grad_y", 0, grad_y.size(1));
  FASTRES_CHECK(size.size() == 2 && std::min(size[0], size[1]) > 0 && std::max(size[0], size[1]) < 1 << 20, op, "size",
                "two numbers from 1", show({size.data(), size.size()}));
  const ConvWindow window{{weight.size(2), weight.size(3)}, stride, padding, dilation};
  const Shape shape{grad_y.size(0), weight.size(1), size[0], size[1]};
  check_output(op, window, grad_y, shape);
  FASTRES_CHECK((stride[0] == 1 || dilation[0] == 1) && (stride[1] == 1 || dilation[1] == 1), op, "stride",
                "1 on a side with dilation", show({stride.data(), 2}));
  const ConvSide high(window, shape, shape_of(grad_y), 0), wide(window, shape, shape_of(grad_y), 1);
  Tensor grad = empty_output(shape, Format::channels_last, grad_y);
  std::atomic<bool> finite{true};
  Scratch scratch;
  std::vector<Work> works;
  const int64_t pixel = shape[1] * 2;
  for (int64_t phase_h = 0; phase_h < std::min(stride[0], size[0]); ++phase_h)
    for (int64_t phase_w = 0; phase_w < std::min(stride[1], size[1]); ++phase_w) {
      const int64_t rows = high.pixels(phase_h), cols = wide.pixels(phase_w);
      const std::array<Taps, 2> taps{taps_of(high, phase_h), taps_of(wide, phase_w)};
      const bool met = taps[0].count > 0 && taps[1].count > 0, whole = stride[0] * stride[1] == 1;
      char* to = met && !whole ? scratch.take<char>(shape[0] * rows * cols * pixel) : nullptr;
      if (met) {
        ConvArgs args{};
        args.y = whole ? grad.data_ptr() : to, args.out_h = rows, args.out_w = cols, args.out_channels = shape[1];
        args.stride_h = args.stride_w = 1;
        args.pad_h = high.step(taps[0].first + (taps[0].count - 1) * taps[0].step);
        args.pad_w = wide.step(taps[1].first + (taps[1].count - 1) * taps[1].step);
        args.dilation_h = dilation[0], args.dilation_w = dilation[1];
        convolve(grad_y, weight, true, taps, args, &finite, scratch, works);
      }
      if (whole) continue;
      const SpreadArgs args{to, static_cast<char*>(grad.data_ptr()) + (phase_h * size[1] + phase_w) * pixel, rows, cols, size[0],
                            stride[0], stride[1], size[1] * pixel, pixel};
      const int64_t grain = std::max<int64_t>(1, kGrain / (cols * shape[1]));
      works.push_back({shape[0] * rows, grain, [args](int64_t begin, int64_t end) { spread(args, begin, end); }});
    }
  run_team(works);
  return finite ? grad : empty_vector(0, ScalarType::Float, grad_y);
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_has_amx() -> bool");
  m.def("cpu_conv_amx(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("cpu_conv_amx_input(Tensor grad_y, Tensor weight, int[] size, int[] stride, int[] padding, int[] dilation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_conv_amx", TORCH_BOX(&fastres::cpu::conv_amx));
  m.impl("cpu_conv_amx_input", TORCH_BOX(&fastres::cpu::conv_amx_input));
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CompositeExplicitAutograd, m) {
  m.impl("cpu_has_amx", TORCH_BOX(&fastres::cpu::has_amx));
}
