// Binding of the weight gradient in tile registers: checks, the grids that x and grad_y lie on, groups of words, registration.
#include "cpu/conv_backward_weight_amx.h"

#include <algorithm>
#include <map>

#include "cpu/channels.h"
#include "cpu/conv_host.h"
#include "cpu/conv_window.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_backward_weight";

constexpr int64_t kGroupBytes = 1 << 20;  // of packed words: a part of L2
constexpr int64_t kLeastUnits = 64;       // products that are worth sharing out; else the words are, in parts
constexpr int64_t kPartWords = 1024, kMostParts = 16;

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How a side of the grid is divided.
struct GridSide : ConvSide {
  using ConvSide::ConvSide;
  int64_t before() const { return std::max<int64_t>(0, -step(0)); }
  int64_t after() const { return std::max<int64_t>(0, step(taps - 1)); }
  int64_t met(int64_t phase) const { return std::min(pixels(phase), out + after()); }  // pixels that taps can meet
  // With zeros for steps out of the image on either side, which share them with the row before or the next one.
  int64_t places() const { return std::max(met(0) + before(), out + after()); }
};

// The pixels of a tensor from one on, every stride-th of them, as many as `rows` and `cols`.
GridPixels pixels_of(const Tensor& t, int64_t row, int64_t col, int64_t stride_h, int64_t stride_w, int64_t rows, int64_t cols) {
  const int64_t pixel = t.size(1) * 2, line = t.size(3) * pixel;
  return {static_cast<const char*>(t.data_ptr()) + row * line + col * pixel, t.size(1), rows, cols, t.size(2) * line,
          stride_h * line, stride_w * pixel};
}

// Packs and multiplies all words, then adds up: the words' parts by a thread each, or one after the other, each by all threads.
void run(ConvBackwardWeightArgs args, int64_t words) {
  const int64_t right_channels = args.right[0].channels, units = multiply_units(args);
  const int64_t wanted = units >= kLeastUnits ? 1 : std::clamp<int64_t>(words / kPartWords, 1, kMostParts);
  const int64_t part = round_up(ceil_div(words, wanted), kTileRows);
  args.parts = ceil_div(words, part), args.part_sums = units * kAmxChannels * kAmxChannels;
  // A group's words are written and read once, the sums once per group: as many as balance the two, or fill a cache.
  const int64_t balance = args.taps * args.left.channels * right_channels / (args.left.channels + right_channels);
  const int64_t fit = kGroupBytes / ((args.left.channels + args.grids * right_channels) * kWordBytes);
  const int64_t most = std::max({fit, balance, 2 * kTileRows});
  const int64_t group = round_up(ceil_div(part, ceil_div(part, most)), kTileRows);
  args.count = group;
  const int64_t left = left_bytes(args), right = right_bytes(args);
  Scratch scratch;
  args.direct = group >= words;
  if (!args.direct) args.sums = scratch.take<float>(args.parts * args.part_sums);
  const auto each_group = [&](char* memory, int64_t first_part, int64_t last_part, auto run) {
    ConvBackwardWeightArgs now = args;
    now.left_tiles = memory, now.right_rows = memory + left;
    for (int64_t p = first_part; p < last_part; ++p) {
      const int64_t end = std::min(round_up(words, kTileRows), (p + 1) * part);
      now.start = p * part, now.sums = args.sums + p * args.part_sums;
      for (now.first = now.start; now.first < end; now.first += now.count) {
        now.count = std::min(group, end - now.first);
        run(now);
      }
    }
  };
  std::vector<Work> works;
  if (args.parts > 1) {
    works.push_back({args.parts, 1, [&](int64_t begin, int64_t end) {
                       Scratch own;
                       each_group(own.take<char>(left + right), begin, end, [&](const ConvBackwardWeightArgs& now) {
                         conv_backward_weight_amx_pack(now, 0, pack_units(now));
                         conv_backward_weight_amx_multiply(now, 0, units);
                       });
                     }});
  } else {
    each_group(scratch.take<char>(left + right), 0, 1, [&](const ConvBackwardWeightArgs& now) {
      const auto pack = [now](int64_t begin, int64_t end) { conv_backward_weight_amx_pack(now, begin, end); };
      const auto multiply = [now](int64_t begin, int64_t end) { conv_backward_weight_amx_multiply(now, begin, end); };
      works.push_back({pack_units(now), 1, pack});
      works.push_back({units, 1, multiply});
    });
  }
  if (!args.direct)
    works.push_back({units, 1, [&](int64_t begin, int64_t end) { conv_backward_weight_amx_finish(args, begin, end); }});
  run_team(works);
}

// The weight gradient of conv2d(x, weight, stride, padding, dilation), dense in channels_last; empty where it is not finite.
Tensor conv_backward_weight_amx(const Tensor& grad_y, const Tensor& x, const Ints& kernel, const Ints& stride,
                                const Ints& padding, const Ints& dilation) {
  const ConvWindow window{kernel, stride, padding, dilation};
  check_amx_operand(kOp, "x", x);
  check_amx_operand(kOp, "grad_y", grad_y);
  check_output(kOp, window, grad_y, shape_of(x));
  const GridSide high(window, shape_of(x), shape_of(grad_y), 0), wide(window, shape_of(x), shape_of(grad_y), 1);
  const int64_t grid_h = high.places(), grid_w = wide.places(), taps = high.taps * wide.taps;
  std::vector<GridPixels> grids;
  std::map<std::array<int64_t, 2>, int64_t> known;
  Ints tap_grid, tap_step;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t y = tap / wide.taps, x_tap = tap % wide.taps;
    const std::array<int64_t, 2> grid{high.phase(y), wide.phase(x_tap)};
    const auto [found, is_new] = known.emplace(grid, static_cast<int64_t>(grids.size()));
    if (is_new)
      grids.push_back(pixels_of(x, grid[0], grid[1], high.stride, wide.stride, high.met(grid[0]), wide.met(grid[1])));
    tap_grid.push_back(found->second);
    tap_step.push_back(high.step(y) * grid_w + wide.step(x_tap));
  }
  const GridPixels gradients = pixels_of(grad_y, 0, 0, 1, 1, high.out, wide.out);
  const auto [least, most] = std::minmax_element(tap_step.begin(), tap_step.end());
  const int64_t pairs = ceil_div(x.size(0), 2);
  // What is on the left is transposed: the fewer channels, if there is but one tap, whose place then is that of x.
  const bool turned = taps == 1 && *least == 0 && x.size(1) < grad_y.size(1);
  Tensor grad = empty_activation(std::array{grad_y.size(1), x.size(1), kernel[0], kernel[1]}, Format::channels_last, x);
  std::atomic<bool> finite{true};
  run({.left = turned ? grids[0] : gradients, .right = turned ? &gradients : grids.data(),
       .grids = static_cast<int64_t>(grids.size()), .grid_h = grid_h, .grid_w = grid_w, .images = x.size(0), .pairs = pairs,
       .taps = taps, .tap_grid = tap_grid.data(), .tap_step = tap_step.data(), .least_step = *least, .span = *most - *least,
       .turned = turned, .left_tiles = nullptr, .right_rows = nullptr, .sums = nullptr, .direct = false, .grad_weight = grad.data_ptr(),
       .first = 0, .count = 0, .start = 0, .parts = 1, .part_sums = 0, .finite = &finite},
      pairs * grid_h * grid_w);
  return finite ? grad : empty_vector(0, ScalarType::Float, x);
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_conv_backward_weight_amx(Tensor grad_y, Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation)"
        " -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_conv_backward_weight_amx", TORCH_BOX(&fastres::cpu::conv_backward_weight_amx));
}
