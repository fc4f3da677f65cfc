// Formula: the largest (NaN if there is one) or the mean of a window's pixels in the image; act((x - mean) * scale + bias);
// act(x[floor(i * in / out)] + residual[i]), the quotient in float as in PyTorch's nearest; act(x * gate + residual).
// Layout: channels last; a thread owns rows of y (pools) or pixels (bn), vectors run along the channels.
// Bytes per output: a window of reads, mostly from L1, and one write.
// Accumulate type: float; sums by lines of pixels and blocks of lines, which keeps those of large maps exact; one rounding, to the
// output type.
// Invariants: every window touches its image, which the binding checks.
#include "cpu/plan.h"

#include "common/epilogue.h"
#include "cpu/loops.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kWide = kLanes<float>;
constexpr int64_t kBlock = 4;  // lines that are joined before they join the others
using Values = Vec<float, kWide>;

// For each pixel of y: result = finish(join of the window's pixels, line by line, their number).
template <typename scalar_t, typename Join, typename Finish>
FASTRES_INLINE void pool_rows(const PoolArgs& args, int64_t begin, int64_t end, float start, Join join, Finish finish) {
  auto* y = static_cast<scalar_t*>(args.y);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / args.out_h, top = at % args.out_h * args.stride_h - args.pad_h;
    const auto* x = static_cast<const scalar_t*>(args.x) + image * args.height * args.width * args.channels;
    const int64_t h0 = top < 0 ? 0 : top, h1 = min(top + args.kernel_h, args.height);
    for (int64_t out = 0; out < args.out_w; ++out) {
      const int64_t left = out * args.stride_w - args.pad_w;
      const int64_t w0 = left < 0 ? 0 : left, w1 = min(left + args.kernel_w, args.width);
      scalar_t* to = y + (at * args.out_w + out) * args.channels;
      for_each<kWide>(args.channels, to, false, [&](int64_t c, auto lanes) {
        Values value = start - Values{}, block = value;
        for (int64_t h = h0; h < h1; ++h) {
          Values line = start - Values{};
          for (int64_t w = w0; w < w1; ++w)
            line = join(line, load<float, kWide>(x + (h * args.width + w) * args.channels + c, lanes));
          block = join(block, line);
          if ((h - h0) % kBlock != kBlock - 1) continue;
          value = join(value, block);
          block = start - Values{};
        }
        store<kWide>(to + c, finish(join(value, block), static_cast<float>((h1 - h0) * (w1 - w0))), lanes);
      });
    }
  }
}

template <typename scalar_t>
void max_rows(const PoolArgs& args, int64_t begin, int64_t end) {
  pool_rows<scalar_t>(
      args, begin, end, -__builtin_inff(),
      [](Values best, Values v) { return (v > best) | (v != v) ? v : best; },  // a NaN stays: nothing is greater
      [](Values best, float) { return best; });
}

template <typename scalar_t>
void avg_rows(const PoolArgs& args, int64_t begin, int64_t end) {
  pool_rows<scalar_t>(
      args, begin, end, 0.0f, [](Values sum, Values v) { return sum + v; },
      [divisor = static_cast<float>(args.divisor)](Values sum, float count) { return sum / (divisor != 0.0f ? divisor : count); });
}

template <typename scalar_t>
void normalise_pixels(const BnPixelsArgs& args, int64_t begin, int64_t end) {
  const float *mean = args.constants, *scale = mean + args.channels, *bias = scale + args.channels;
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const auto* x = static_cast<const scalar_t*>(args.x) + pixel * args.channels;
    auto* y = static_cast<scalar_t*>(args.y) + pixel * args.channels;
    for_each<kWide>(args.channels, y, false, [&](int64_t c, auto lanes) {
      const Values v = normalise(load<float, kWide>(x + c, lanes), load<float, kWide>(mean + c, lanes),
                                 load<float, kWide>(scale + c, lanes), load<float, kWide>(bias + c, lanes));
      store<kWide>(y + c, args.act == Act::kRelu ? relu(v) : v, lanes);
    });
  }
}

// The pixel of x that a pixel of y shows.
FASTRES_INLINE int64_t nearest(int64_t at, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  return min(static_cast<int64_t>(static_cast<float>(at) * scale), in - 1);
}

template <typename scalar_t>
void add_nearest(const UpsampleArgs& args, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; ++at) {
    const int64_t image = at / args.out_h, row = nearest(at % args.out_h, args.height, args.out_h);
    const auto* x = static_cast<const scalar_t*>(args.x) + (image * args.height + row) * args.width * args.channels;
    for (int64_t w = 0; w < args.out_w; ++w) {
      const auto* pixel = x + nearest(w, args.width, args.out_w) * args.channels;
      const int64_t offset = (at * args.out_w + w) * args.channels;
      const auto* residual = static_cast<const scalar_t*>(args.residual);
      auto* y = static_cast<scalar_t*>(args.y) + offset;
      for_each<kWide>(args.channels, y, false, [&](int64_t c, auto lanes) {
        Values v = load<float, kWide>(pixel + c, lanes);
        if (residual) v += load<float, kWide>(residual + offset + c, lanes);
        store<kWide>(y + c, args.act == Act::kRelu ? relu(v) : v, lanes);
      });
    }
  }
}

template <typename scalar_t>
void gate_pixels(const GateArgs& args, int64_t begin, int64_t end) {
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t offset = pixel * args.channels;
    const auto* gate = static_cast<const scalar_t*>(args.gate) + pixel / args.pixels * args.channels;
    const auto *x = static_cast<const scalar_t*>(args.x) + offset, *residual = static_cast<const scalar_t*>(args.residual);
    auto* y = static_cast<scalar_t*>(args.y) + offset;
    for_each<kWide>(args.channels, y, false, [&](int64_t c, auto lanes) {
      Values v = load<float, kWide>(x + c, lanes) * load<float, kWide>(gate + c, lanes);
      if (residual) v += load<float, kWide>(residual + offset + c, lanes);
      store<kWide>(y + c, args.act == Act::kRelu ? relu(v) : v, lanes);
    });
  }
}

}  // namespace

void max_pool(const PoolArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) max_rows<bf16>(args, begin, end);
  else max_rows<float>(args, begin, end);
}

void avg_pool(const PoolArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) avg_rows<bf16>(args, begin, end);
  else avg_rows<float>(args, begin, end);
}

void upsample_add(const UpsampleArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) add_nearest<bf16>(args, begin, end);
  else add_nearest<float>(args, begin, end);
}

void gate_channels(const GateArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) gate_pixels<bf16>(args, begin, end);
  else gate_pixels<float>(args, begin, end);
}

void bn_pixels(const BnPixelsArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) normalise_pixels<bf16>(args, begin, end);
  else normalise_pixels<float>(args, begin, end);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
