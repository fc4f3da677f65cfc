// The steps of a plan on 8-bit integers: their float constants, checked, and their kernels.
#include "cpu/plan_int8.h"

#include "cpu/plan_call.h"

namespace fastres::cpu {
namespace {

constexpr int64_t kInt8MostTerms = 65536;  // of 255 * 127 each: their sum fits an int32

const float* floats(const Call& call, const PlanRow& row, int64_t count) {
  const Tensor& t = call.constant(row.bias);
  FASTRES_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == count, kPlan, "a step's scales", count << " float32",
                show(t.sizes()));
  return static_cast<const float*>(t.data_ptr());
}

bool is_float_output(const Call& call, const PlanRow& row) {
  const bool output = row.y.offset <= kOutput;
  FASTRES_CHECK(!output || call.dtype == DType::kFloat32, kPlan, "an output", "float32", "another dtype");
  return output;
}

// The input: scale, zero point. A value: zero point.
Work pad(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const PadSource source(call, row, first, images, 1);
  char* y = call.at(row.y, first, images, padded_elements(row));
  if (row.x.offset != kInput) {
    const float zero = floats(call, row, 1)[0];
    return pad_work({1, source.x, y, images, row.channels, row.out_h, row.out_w, source.image_step, source.channel_step,
                    source.row_step, source.pixel_step, row.out_channels, row.pad_h, row.pad_w, static_cast<uint8_t>(zero)});
  }
  const float* constants = floats(call, row, 2);
  return image_work(call, row, source, y, images, true, constants[0], constants[1]);
}

// For each output channel a scale, then for each a bias, then the residual's scale.
Work conv(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const bool float_y = is_float_output(call, row);
  ConvInt8Args args{conv_args(call, row, first, images, 1, float_y ? 4 : 1), nullptr, 0.0f, float_y};
  const int64_t depth = row.kernel_h * row.kernel_w * row.run;
  const Tensor& weight = call.constant(row.weight);
  FASTRES_CHECK(row.groups == 1, kPlan, "a convolution in int8", "in one group", row.groups);
  FASTRES_CHECK(depth * kWordBytes <= kInt8MostTerms, kPlan, "a convolution in int8", "of at most 65536 terms", depth * kWordBytes);
  FASTRES_CHECK(weight.scalar_type() == ScalarType::Char &&
                    weight.numel() == packed_words(row.out_channels, depth) * kWordBytes,
                kPlan, "weights", "int8, packed for their convolution", show(weight.sizes()));
  const float* constants = floats(call, row, 2 * row.out_channels + 1);
  args.conv.weight = weight.data_ptr(), args.conv.bias = constants + row.out_channels;
  args.scale = constants, args.residual_scale = constants[2 * row.out_channels];
  return conv_int8_work(args, call.threads);
}

// The mean: scale, bias. The maximum: none.
Work pool(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  check_windows(row);
  const bool max = row.kind == Step::kMaxPool;
  const float* constants = max ? nullptr : floats(call, row, 2);
  const auto* x = call.at(row.x, first, images, row.height * row.width * row.channels);
  auto* y = call.at(row.y, first, images, row.out_h * row.out_w * row.channels);
  const PoolInt8Args args{reinterpret_cast<const uint8_t*>(x), reinterpret_cast<uint8_t*>(y), row.channels, row.height,
                          row.width, row.out_h, row.out_w, row.kernel_h, row.kernel_w, row.stride_h, row.stride_w, row.pad_h,
                          row.pad_w, max ? 0.0f : constants[0], max ? 0.0f : constants[1]};
  const auto kernel = max ? &max_pool_int8 : &avg_pool_int8;
  return {images * row.out_h, std::max<int64_t>(1, kGrain / (row.width * row.channels)),
          [args, kernel](int64_t begin, int64_t end) { kernel(args, begin, end); }};
}

// For each channel a scale, then for each a bias.
Work bn(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t pixels = row.height * row.width, c = row.channels;
  const float* constants = floats(call, row, 2 * c);
  const BnInt8Args args{reinterpret_cast<const uint8_t*>(call.at(row.x, first, images, pixels * c)), constants, constants + c,
                        reinterpret_cast<uint8_t*>(call.at(row.y, first, images, pixels * c)), c};
  return {images * pixels, std::max<int64_t>(1, kGrain / c), [args](int64_t begin, int64_t end) { bn_int8(args, begin, end); }};
}

// The scales of both, and the bias.
Work add(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const bool float_y = is_float_output(call, row);
  const int64_t numel = row.out_h * row.out_w * row.out_channels;
  const float* constants = floats(call, row, 3);
  const auto* b = row.residual.offset == kNone ? nullptr : call.at(row.residual, first, images, numel);
  const AddInt8Args args{reinterpret_cast<const uint8_t*>(call.at(row.x, first, images, numel)),
                         reinterpret_cast<const uint8_t*>(b), call.at(row.y, first, images, numel * (float_y ? 4 : 1)), float_y,
                         constants[0], constants[1], constants[2]};
  return {images * numel, kGrain, [args](int64_t begin, int64_t end) { add_int8(args, begin, end); }};
}

}  // namespace

Work int8_work(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(int8_lacks() == nullptr, kPlan, "the processor", "one with " << int8_lacks() << " for int8", "one without");
  FASTRES_CHECK(row.y.offset > kOutput || row.kind == Step::kConv || row.kind == Step::kAdd, kPlan, "the last step",
                "a convolution or an addition", static_cast<int64_t>(row.kind));
  switch (row.kind) {
    case Step::kPad: return pad(call, row, first, images);
    case Step::kConv: return conv(call, row, first, images);
    case Step::kMaxPool:
    case Step::kAvgPool: return pool(call, row, first, images);
    case Step::kBn: return bn(call, row, first, images);
    case Step::kAdd: return add(call, row, first, images);
    default: FASTRES_CHECK(false, kPlan, "a step", "one of this build", static_cast<int64_t>(row.kind));
  }
  return {};
}

}  // namespace fastres::cpu
