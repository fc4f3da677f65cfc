// Formula: 1 / (1 + exp(-x)), x / (1 + exp(-x)), min(max(x + 3, 0), 6) / 6, x times that, x or low * x where x is not
// positive, min(max(x, low), high); as in PyTorch also of NaN, infinities and -0.
// Layout: any; vectors run along memory, and y may be x.
// Bytes per output: one read, one write.
// Accumulate type: float; one rounding, to the output type.
// Invariants: an output is the same wherever in a range it lies.
#include "cpu/plan.h"

#include "cpu/loops.h"

#if defined(FASTRES_CPU_LEVEL) && FASTRES_CPU_LEVEL >= 3

namespace fastres::cpu::FASTRES_LEVEL {
namespace {

constexpr int64_t kWide = kLanes<float>;
using Values = Vec<float, kWide>;
using Ints = Vec<int32_t, kWide>;

FASTRES_INLINE Values clamp(Values v, float low, float high) {
  v = v < low ? low - Values{} : v;  // of NaN neither is true
  return v > high ? high - Values{} : v;
}

// 2^n for -126 <= n <= 127.
FASTRES_INLINE Values power_of_two(Ints n) { return bits_as<Values>((n + 127) << 23); }

// exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where eight terms of the series are exact to a tenth of a unit in the last place.
// 2^n comes in two factors: the result may be infinity. It is added to 1, so that none needs to be less than 2^-126.
FASTRES_INLINE Values exponential(Values x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // the first times n is exact
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  x = clamp(x, -126.0f / kLog2E, 130.0f / kLog2E);
  const Values shifted = x * kLog2E + kMagic, whole = shifted - kMagic;
  const Values r = (x - whole * kLn2High) - whole * kLn2Low;
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  Values sum = 1.0f / 5040 - Values{};
  for (const float term : kTerms) sum = sum * r + term;
  const Ints n = bits_as<Ints>(shifted) - bits_as<Ints>(kMagic - Values{});
  return sum * power_of_two(n >> 1) * power_of_two(n - (n >> 1));
}

template <typename scalar_t, typename F>
FASTRES_INLINE void each(const ActivationArgs& args, int64_t begin, int64_t end, F f) {
  const auto* x = static_cast<const scalar_t*>(args.x) + begin;
  auto* y = static_cast<scalar_t*>(args.y) + begin;
  for_each<kWide>(end - begin, y, false,
                  [&](int64_t i, auto lanes) { store<kWide>(y + i, f(load<float, kWide>(x + i, lanes)), lanes); });
}

template <typename scalar_t>
void activate(const ActivationArgs& args, int64_t begin, int64_t end) {
  const auto run = [&](auto f) { each<scalar_t>(args, begin, end, f); };
  switch (args.function) {
    case Function::kSigmoid: return run([](Values v) { return 1.0f / (1.0f + exponential(-v)); });
    case Function::kSilu: return run([](Values v) { return v / (1.0f + exponential(-v)); });
    case Function::kHardSigmoid: return run([](Values v) { return clamp(v + 3.0f, 0.0f, 6.0f) / 6.0f; });
    case Function::kHardSwish: return run([](Values v) { return v * clamp(v + 3.0f, 0.0f, 6.0f) / 6.0f; });
    case Function::kLeakyRelu: return run([low = args.low](Values v) { return v > 0.0f ? v : v * low; });
    case Function::kClamp: return run([low = args.low, high = args.high](Values v) { return clamp(v, low, high); });
  }
}

}  // namespace

void activation(const ActivationArgs& args, int64_t begin, int64_t end) {
  if (args.dtype == DType::kBFloat16) activate<bf16>(args, begin, end);
  else activate<float>(args, begin, end);
}

}  // namespace fastres::cpu::FASTRES_LEVEL

#endif
