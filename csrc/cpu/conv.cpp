// Binding of conv, conv_backward_input and conv_backward_weight: 3x3, stride 1, by Winograd's F(2x2, 3x3); and of both
// gradients of any kernel over few pixels.
#include "cpu/conv.h"

#include <array>

#include "cpu/channels.h"
#include "cpu/conv_host.h"
#include "cpu/conv_window.h"

namespace fastres::cpu {
namespace {

constexpr int64_t kGroupBytes = 4 << 20;  // of transformed tiles, written and read again: they stay in L3
constexpr int64_t kLeastGroup = 64;       // words of tiles
// With so few channels it takes longer to move a tile between cores than to multiply it: 700 us instead of 150 for 128x16x8x8
// where two cores multiply the tiles of one (AMD EPYC, Zen 4, 2026-11-25). The tiles are then split into parts, each with its
// own sums, and with its groups in the L2 of the one core that works on it.
constexpr int64_t kFewProducts = 4096;
constexpr int64_t kPartBytes = 256 << 10;
constexpr int64_t kMostParts = 16;

void check_activation(const char* op, const char* param, const Tensor& t) {
  check_cpu(op, param, t);
  FASTRES_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, op, param,
                "float32 or bfloat16", show(t.scalar_type()));
  FASTRES_CHECK(t.dim() == 4 && t.numel() > 0 && is_dense(t, Format::channels_last), op, param,
                "four-dimensional, not empty and dense in channels_last", show(t.sizes()));
  const int64_t lanes = conv_tile().lanes;
  FASTRES_CHECK(t.size(1) % lanes == 0 && t.size(1) <= kConvMostRun, op, param,
                "of channels in whole vectors of " << lanes << ", at most " << kConvMostRun, t.size(1));
  const char* lacks = conv_lacks(dtype_of(t));
  FASTRES_CHECK(lacks == nullptr, op, "the processor", "one with " << lacks << " for " << show(t.scalar_type()), "one without");
}

void check_padding(const char* op, const Ints& padding, const Tensor& x) {
  FASTRES_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0 && std::max(padding[0], padding[1]) < 1 << 20 &&
                    x.size(2) + 2 * padding[0] >= 3 && x.size(3) + 2 * padding[1] >= 3,
                op, "padding", "two numbers from 0, with which the kernel fits into x", show({padding.data(), padding.size()}));
}

ConvArgs arguments(const Tensor& x, int64_t out_channels, const Ints& padding) {
  const int64_t height = x.size(2), width = x.size(3), pixel = x.size(1) * element_size(dtype_of(x));
  return {.dtype = dtype_of(x), .act = Act::kNone, .stream = false, .x = x.data_ptr(), .weight = nullptr, .bias = nullptr,
          .residual = nullptr, .y = nullptr, .images = x.size(0), .height = height, .width = width,
          .image_step = height * width * pixel, .row_step = width * pixel, .pixel_step = pixel,
          .out_h = height + 2 * padding[0] - 2, .out_w = width + 2 * padding[1] - 2, .out_channels = out_channels,
          .out_step = out_channels,
          .kernel_h = 3, .kernel_w = 3, .stride_h = 1, .stride_w = 1, .pad_h = padding[0], .pad_w = padding[1],
          .dilation_h = 1, .dilation_w = 1, .run = pixel / kWordBytes, .dense = false, .share_channels = false, .block = 0};
}

// conv2d(x, weight, padding=padding); `turned`: with each kernel rotated by 180 degrees and input and output channels exchanged.
// Returns an empty tensor where a weight or an output is not finite: the transform would spread it.
Tensor conv(const Tensor& x, const Tensor& weight, const Ints& padding, bool turned) {
  const char* op = turned ? "conv_backward_input" : "conv";
  check_activation(op, turned ? "grad_y" : "x", x);
  check_padding(op, padding, x);
  check_cpu(op, "weight", weight);
  FASTRES_CHECK(weight.scalar_type() == x.scalar_type() && weight.dim() == 4 && weight.size(turned ? 0 : 1) == x.size(1) &&
                    weight.size(turned ? 1 : 0) > 0 && weight.size(2) == 3 && weight.size(3) == 3,
                op, "weight", "of x's dtype, of 3x3 kernels over " << x.size(1) << " channels", show(weight.sizes()));
  const int64_t out_channels = weight.size(turned ? 1 : 0), channels = x.size(1);
  const int64_t rows = weight.stride(2), cols = weight.stride(3), turn = turned ? -1 : 1;
  ConvArgs args = arguments(x, out_channels, padding);
  Tensor packed = empty_vector(packed_words(out_channels, kWinogradPoints * args.run), ScalarType::Float, x);
  std::atomic<bool> finite{true};
  const ConvWeightArgs weights{
      .dtype = args.dtype,
      .weight = static_cast<const char*>(weight.data_ptr()) + (turned ? (2 * rows + 2 * cols) * element_size(args.dtype) : 0),
      .packed = static_cast<float*>(packed.data_ptr()), .out_channels = out_channels, .channels = channels,
      .out_step = weight.stride(turned ? 1 : 0), .channel_step = weight.stride(turned ? 0 : 1), .row_step = turn * rows,
      .col_step = turn * cols, .finite = &finite};
  parallel_for(0, winograd_blocks(args) * conv_weight_vectors(weights), 2,
               [&](int64_t begin, int64_t end) { conv_transform_weight(weights, begin, end); });
  if (!finite) return empty_vector(0, ScalarType::Float, x);
  Tensor y = empty_activation(std::array{x.size(0), out_channels, args.out_h, args.out_w}, Format::channels_last, x);
  const std::vector<float> bias(out_channels);
  args.weight = packed.data_ptr(), args.bias = bias.data(), args.y = y.data_ptr();
  run_winograd(args, &finite);
  return finite ? y : empty_vector(0, ScalarType::Float, x);
}

// The weight gradient of conv2d(x, weight, padding=padding), dense in channels_last; empty where it is not finite.
Tensor conv_backward_weight(const Tensor& grad_y, const Tensor& x, const Ints& padding) {
  const char* op = "conv_backward_weight";
  check_activation(op, "x", x);
  check_activation(op, "grad_y", grad_y);
  check_padding(op, padding, x);
  const int64_t channels = x.size(1), out_channels = grad_y.size(1), lanes = conv_tile().channels;
  const ConvArgs conv = arguments(x, out_channels, padding);
  FASTRES_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.size(0) == x.size(0) && grad_y.size(2) == conv.out_h &&
                    grad_y.size(3) == conv.out_w,
                op, "grad_y", "of x's dtype and the output's " << conv.out_h << "x" << conv.out_w << " pixels", show(grad_y.sizes()));
  const WinogradArgs forward{conv, ceil_div(conv.out_h, 2), ceil_div(conv.out_w, 2), 0};
  const int64_t tiles = conv.images * forward.tiles_h * forward.tiles_w, sums = kWinogradPoints * channels * out_channels;
  const int64_t together = kWordBytes / element_size(conv.dtype);
  const bool few = channels * out_channels <= kFewProducts;
  const int64_t wanted = few ? std::clamp<int64_t>(tiles / (together * kLeastGroup), 1, kMostParts) : 1;
  const int64_t part = ceil_div(tiles, wanted * together) * together, parts = ceil_div(tiles, part);
  // A group's tiles are written and read once, the sums once per group: as many tiles as balance the two, or fill a cache.
  const int64_t fit = (few ? kPartBytes : kGroupBytes) / (kWinogradPoints * (channels + out_channels) * kWordBytes);
  const int64_t most = together * std::max({kLeastGroup, channels * out_channels / (channels + out_channels), fit});
  const int64_t groups = ceil_div(part, most), group = ceil_div(part, groups * together) * together;
  const int64_t x_step = point_step(group / together * channels), y_step = point_step(group / together * out_channels);
  Tensor points = empty_vector(parts * sums, ScalarType::Float, x);
  Tensor grad = empty_activation(std::array{out_channels, channels, int64_t{3}, int64_t{3}}, Format::channels_last, x);
  std::atomic<bool> finite{true};
  ConvGradArgs args{.forward = forward, .grad_y = grad_y.data_ptr(), .points = static_cast<float*>(points.data_ptr()),
                    .x_tiles = nullptr, .y_tiles = nullptr, .grad_weight = grad.data_ptr(), .x_step = x_step,
                    .y_step = y_step, .first = 0, .count = 0, .start = 0, .parts = parts, .finite = &finite};
  const auto each_group = [&](float* memory, int64_t first_part, int64_t last_part, auto run) {
    ConvGradArgs now = args;
    now.x_tiles = memory, now.y_tiles = memory + kWinogradPoints * x_step;
    for (int64_t p = first_part; p < last_part; ++p) {
      const int64_t end = std::min(tiles, (p + 1) * part);
      now.start = p * part, now.points = args.points + p * sums;
      for (now.first = now.start; now.first < end; now.first += now.count) {
        now.count = std::min(group, end - now.first);
        run(now, ceil_div(now.count, together), kWinogradPoints * ceil_div(channels, lanes));
      }
    }
  };
  Scratch scratch;
  std::vector<Work> works;
  const int64_t memory = kWinogradPoints * (x_step + y_step);
  if (few) {
    works.push_back({parts, 1, [&](int64_t begin, int64_t end) {
                       Scratch own;
                       each_group(own.take<float>(memory), begin, end, [](const auto& now, int64_t words, int64_t blocks) {
                         conv_grad_transform(now, 0, words);
                         conv_grad_multiply(now, 0, blocks);
                       });
                     }});
  } else {
    each_group(scratch.take<float>(memory), 0, 1, [&](const auto& now, int64_t words, int64_t blocks) {
      works.push_back({words, 4, [now](int64_t begin, int64_t end) { conv_grad_transform(now, begin, end); }});
      works.push_back({blocks, 1, [now](int64_t begin, int64_t end) { conv_grad_multiply(now, begin, end); }});
    });
  }
  works.push_back({out_channels, 4, [&](int64_t begin, int64_t end) { conv_grad_finish(args, begin, end); }});
  run_team(works);
  return finite ? grad : empty_vector(0, ScalarType::Float, x);
}

// The pixels that each tap joins, tap by tap; `first` gets where each tap's begin, and the end.
std::vector<PixelPair> pixel_pairs(const Shape& y, const Shape& x, const ConvWindow& window,
                                   std::vector<int64_t>& first) {
  std::vector<PixelPair> pairs;
  const auto inside = [](int64_t at, int64_t size) { return at >= 0 && at < size; };
  for (int64_t tap = 0; tap < window.kernel[0] * window.kernel[1]; ++tap) {
    first.push_back(static_cast<int64_t>(pairs.size()));
    const int64_t down = tap / window.kernel[1] * window.dilation[0] - window.padding[0];
    const int64_t right = tap % window.kernel[1] * window.dilation[1] - window.padding[1];
    for (int64_t at = 0; at < y[0] * y[2] * y[3]; ++at) {
      const int64_t image = at / (y[2] * y[3]);
      const int64_t row = at / y[3] % y[2] * window.stride[0] + down;
      const int64_t col = at % y[3] * window.stride[1] + right;
      if (inside(row, x[2]) && inside(col, x[3]))
        pairs.push_back({at * y[1], ((image * x[2] + row) * x[3] + col) * x[1]});
    }
  }
  first.push_back(static_cast<int64_t>(pairs.size()));
  return pairs;
}

// conv2d(x, weight, stride, padding, dilation) for few pixels; the weights dense in channels_last.
Tensor few(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const char* op = "conv";
  check_activation(op, "x", x);
  check_activation(op, "weight", weight);
  const int64_t channels = x.size(1), out_channels = weight.size(0), lanes = conv_tile().lanes;
  FASTRES_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(1) == channels && out_channels % lanes == 0, op, "weight",
                "of x's dtype, for its " << channels << " channels, of rows in whole vectors of " << lanes, show(weight.sizes()));
  const ConvWindow window{{weight.size(2), weight.size(3)}, stride, padding, dilation};
  const Shape sizes = output_shape(op, window, shape_of(x), out_channels);
  std::vector<int64_t> first;
  const std::vector<PixelPair> pairs = pixel_pairs(sizes, shape_of(x), window, first);
  Tensor y = empty_output(sizes, Format::channels_last, x);
  const ConvInnerArgs args{.dtype = dtype_of(x), .x = x.data_ptr(), .weight = weight.data_ptr(), .y = y.data_ptr(),
                           .out_channels = out_channels, .channels = channels, .taps = weight.size(2) * weight.size(3),
                           .pixels = y.numel() / out_channels, .pairs = pairs.data(), .first_pair = first.data()};
  const int64_t work = static_cast<int64_t>(pairs.size() + 1) * channels * lanes;
  run_now({out_channels / lanes, ceil_div(kLeastWork, work), [&](int64_t begin, int64_t end) { conv_inner(args, begin, end); }});
  return y;
}

// The weight gradient of that convolution, dense in channels_last.
Tensor few_backward_weight(const Tensor& grad_y, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                           const Ints& dilation) {
  const char* op = "conv_backward_weight";
  check_activation(op, "x", x);
  check_activation(op, "grad_y", grad_y);
  FASTRES_CHECK(grad_y.scalar_type() == x.scalar_type(), op, "grad_y", "of x's dtype", show(grad_y.scalar_type()));
  const ConvWindow window{kernel, stride, padding, dilation};
  const Shape sizes = shape_of(x);
  check_output(op, window, grad_y, sizes);
  std::vector<int64_t> first;
  const std::vector<PixelPair> pairs = pixel_pairs(shape_of(grad_y), sizes, window, first);
  Tensor grad = empty_output(std::array{grad_y.size(1), x.size(1), kernel[0], kernel[1]}, Format::channels_last, x);
  const ConvOuterArgs args{.dtype = dtype_of(x), .grad_y = grad_y.data_ptr(), .x = x.data_ptr(), .grad = grad.data_ptr(),
                           .out_channels = grad_y.size(1), .channels = x.size(1), .taps = kernel[0] * kernel[1],
                           .x_values = x.numel(), .pairs = pairs.data(), .first_pair = first.data()};
  const int64_t work = static_cast<int64_t>(pairs.size() + 1) * x.size(1) * kOuterRows;
  parallel_for(0, grad_y.size(1) / kOuterRows, ceil_div(kLeastWork, work),
               [&](int64_t begin, int64_t end) { conv_outer_weight(args, begin, end); });
  return grad;
}

// The gradient of its x, of so many rows and columns; the weights dense in channels_last.
Tensor few_backward_input(const Tensor& grad_y, const Tensor& weight, const Ints& size, const Ints& stride,
                                 const Ints& padding, const Ints& dilation) {
  const char* op = "conv_backward_input";
  check_activation(op, "grad_y", grad_y);
  check_activation(op, "weight", weight);
  FASTRES_CHECK(weight.scalar_type() == grad_y.scalar_type() && weight.size(0) == grad_y.size(1), op, "weight",
                "of grad_y's dtype, for its " << grad_y.size(1) << " channels", show(weight.sizes()));
  FASTRES_CHECK(size.size() == 2 && std::min(size[0], size[1]) > 0 && std::max(size[0], size[1]) < 1 << 20, op, "size",
                "two numbers from 1", show({size.data(), size.size()}));
  const ConvWindow window{{weight.size(2), weight.size(3)}, stride, padding, dilation};
  const Shape sizes{grad_y.size(0), weight.size(1), size[0], size[1]};
  check_output(op, window, grad_y, sizes);
  std::vector<int64_t> first;
  const std::vector<PixelPair> pairs = pixel_pairs(shape_of(grad_y), sizes, window, first);
  Tensor grad = empty_output(sizes, Format::channels_last, grad_y);
  const ConvOuterArgs args{.dtype = dtype_of(grad_y), .grad_y = grad_y.data_ptr(), .x = weight.data_ptr(), .grad = grad.data_ptr(),
                           .out_channels = grad_y.size(1), .channels = weight.size(1), .taps = weight.size(2) * weight.size(3),
                           .x_values = grad.numel(), .pairs = pairs.data(), .first_pair = first.data()};
  const int64_t lanes = conv_tile().lanes, work = static_cast<int64_t>(pairs.size() + 1) * grad_y.size(1) * lanes;
  run_now({weight.size(1) / lanes, ceil_div(kLeastWork, work),
           [&](int64_t begin, int64_t end) { conv_outer_input(args, begin, end); }});
  return grad;
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_conv(Tensor x, Tensor weight, int[] padding, bool turned) -> Tensor");
  m.def("cpu_conv_backward_weight(Tensor grad_y, Tensor x, int[] padding) -> Tensor");
  m.def("cpu_conv_inner(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("cpu_conv_outer_weight(Tensor grad_y, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def("cpu_conv_outer_input(Tensor grad_y, Tensor weight, int[] size, int[] stride, int[] padding, int[] dilation)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_conv", TORCH_BOX(&fastres::cpu::conv));
  m.impl("cpu_conv_backward_weight", TORCH_BOX(&fastres::cpu::conv_backward_weight));
  m.impl("cpu_conv_inner", TORCH_BOX(&fastres::cpu::few));
  m.impl("cpu_conv_outer_weight", TORCH_BOX(&fastres::cpu::few_backward_weight));
  m.impl("cpu_conv_outer_input", TORCH_BOX(&fastres::cpu::few_backward_input));
}
