// Binding of a frozen network: checks that a program stays within its memory, then has one team of threads run it.
#include "cpu/plan.h"

#include <cstring>

#include "cpu/add_act.h"
#include "cpu/conv_host.h"
#include "cpu/plan_call.h"

namespace fastres::cpu {
namespace {

Work pad(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const PadSource source(call, row, first, images, call.size);
  char* y = call.at(row.y, first, images, padded_elements(row) * call.size);
  if (row.x.offset == kInput && dtype_of(call.x) != call.dtype)
    return image_work(call, row, source, y, images, false, 1.0f, 0.0f);
  return pad_work({call.size, source.x, y, images, row.channels, row.out_h,
           row.out_w, source.image_step, source.channel_step, source.row_step, source.pixel_step, row.out_channels, row.pad_h,
           row.pad_w});
}

Work conv(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  ConvArgs args = conv_args(call, row, first, images, call.size, call.size);
  const int64_t depth = row.winograd ? kWinogradPoints * row.run : row.kernel_h * row.kernel_w * row.run;
  const Tensor &weight = call.constant(row.weight), &bias = call.constant(row.bias);
  const char* lack = row.groups == 1 ? nullptr : groups_lack(row.channels, row.out_channels, row.groups, call.size);
  FASTRES_CHECK(lack == nullptr, kPlan, "a convolution in groups", "of " << lack, row.groups);
  FASTRES_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == row.out_channels, kPlan, "a bias",
                "float32, one for each output channel", show(bias.sizes()));
  FASTRES_CHECK(dtype_of(weight) == call.dtype &&
                    weight.numel() * call.size == packed_words(row.out_channels, depth, row.groups) * kWordBytes,
                kPlan, "weights", "packed for their convolution", show(weight.sizes()));
  FASTRES_CHECK(!row.winograd || (call.dtype == DType::kFloat32 && row.channels % conv_tile().lanes == 0 &&
                                  row.run == row.channels && row.kernel_h * row.kernel_w == 9 && row.kernel_h == 3 &&
                                  row.stride_h * row.stride_w * row.dilation_h * row.dilation_w == 1),
                kPlan, "a convolution by Winograd", "3x3, stride 1, float32, of channels in whole vectors", row.channels);
  args.weight = weight.data_ptr(), args.bias = static_cast<const float*>(bias.data_ptr());
  if (row.groups > 1) return grouped_work(args, row.groups, call.threads);
  return row.winograd ? winograd_work(args, call.threads) : conv_work(args, call.threads);
}

Work pool(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const char* x = call.at(row.x, first, images, row.height * row.width * row.channels * call.size);
  char* y = call.at(row.y, first, images, row.out_h * row.out_w * row.channels * call.size);
  check_windows(row);
  const PoolArgs args{call.dtype, x, y, images, row.channels, row.height, row.width, row.out_h, row.out_w,
                      row.kernel_h, row.kernel_w, row.stride_h, row.stride_w, row.pad_h, row.pad_w, row.run};
  const int64_t grain = std::max<int64_t>(1, kGrain / (row.width * row.channels));
  const auto kernel = row.kind == Step::kMaxPool ? &max_pool : &avg_pool;
  return {images * row.out_h, grain, [args, kernel](int64_t begin, int64_t end) { kernel(args, begin, end); }};
}

Work bn(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t pixels = row.height * row.width, bytes = pixels * row.channels * call.size;
  const Tensor& constants = call.constant(row.weight);
  FASTRES_CHECK(constants.scalar_type() == ScalarType::Float && constants.numel() == 3 * row.channels, kPlan,
                "a batch norm's constants", "float32, three for each channel", show(constants.sizes()));
  const BnPixelsArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone, call.at(row.x, first, images, bytes),
                          static_cast<const float*>(constants.data_ptr()), call.at(row.y, first, images, bytes), row.channels};
  return {images * pixels, std::max<int64_t>(1, kGrain / row.channels),
          [args](int64_t begin, int64_t end) { bn_pixels(args, begin, end); }};
}

Work add(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t numel = row.out_h * row.out_w * row.out_channels, bytes = numel * call.size;
  const void* b = row.residual.offset == kNone ? nullptr : call.at(row.residual, first, images, bytes);
  const AddActArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone, false, call.at(row.x, first, images, bytes), b,
                        call.at(row.y, first, images, bytes)};
  return {images * numel, kGrain, [args](int64_t begin, int64_t end) { add_act_forward(args, begin, end); }};
}

Work upsample(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(row.out_channels == row.channels, kPlan, "an enlarged value", "of as many channels as before", row.channels);
  const bool added = row.residual.offset != kNone;
  const int64_t bytes = row.out_h * row.out_w * row.channels * call.size;
  const UpsampleArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone,
                          call.at(row.x, first, images, row.height * row.width * row.channels * call.size),
                          added ? call.at(row.residual, first, images, bytes) : nullptr, call.at(row.y, first, images, bytes),
                          row.channels, row.height, row.width, row.out_h, row.out_w};
  return {images * row.out_h, std::max<int64_t>(1, kGrain / (row.out_w * row.channels)),
          [args](int64_t begin, int64_t end) { upsample_add(args, begin, end); }};
}

Work gate(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(row.out_channels == row.channels && row.out_h == row.height && row.out_w == row.width, kPlan, "a gated value",
                "of its own size", row.channels);
  const int64_t pixels = row.height * row.width, bytes = pixels * row.channels * call.size;
  const bool added = row.residual.offset != kNone;
  const GateArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone, call.at(row.x, first, images, bytes),
                      call.at(row.gate, first, images, row.channels * call.size),
                      added ? call.at(row.residual, first, images, bytes) : nullptr, call.at(row.y, first, images, bytes),
                      row.channels, pixels};
  return {images * pixels, std::max<int64_t>(1, kGrain / row.channels),
          [args](int64_t begin, int64_t end) { gate_channels(args, begin, end); }};
}

Work activation(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t numel = row.height * row.width * row.channels, bytes = numel * call.size;
  FASTRES_CHECK(row.run >= 0 && row.run <= static_cast<int64_t>(Function::kClamp), kPlan, "an activation", "one of this build",
                row.run);
  const ActivationArgs args{call.dtype, static_cast<Function>(row.run), static_cast<float>(row.low), static_cast<float>(row.high),
                            call.at(row.x, first, images, bytes), call.at(row.y, first, images, bytes)};
  return {images * numel, kGrain / 4, [args](int64_t begin, int64_t end) { activation(args, begin, end); }};
}

Work copy(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(row.out_h == row.height && row.out_w == row.width && row.run >= 1 && row.begin >= 0 && row.at >= 0 &&
                    row.run <= row.channels - row.begin && row.run <= row.out_channels - row.at,
                kPlan, "copied channels", "within both pixels", row.run);
  const int64_t pixels = row.height * row.width, from = row.channels * call.size, to = row.out_channels * call.size;
  const char* x = call.at(row.x, first, images, pixels * from) + row.begin * call.size;
  char* y = call.at(row.y, first, images, pixels * to) + row.at * call.size;
  const size_t bytes = row.run * call.size;
  return {images * pixels, std::max<int64_t>(1, kGrain / row.run), [=](int64_t begin, int64_t end) {
            for (int64_t pixel = begin; pixel < end; ++pixel) std::memcpy(y + pixel * to, x + pixel * from, bytes);
          }};
}

Work work_of(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(std::min({row.channels, row.height, row.width, row.out_channels, row.out_h, row.out_w}) >= 1, kPlan,
                "a step's sizes", "at least 1", row.channels);
  if (row.int8) return int8_work(call, row, first, images);
  switch (row.kind) {
    case Step::kPad: return pad(call, row, first, images);
    case Step::kConv: return conv(call, row, first, images);
    case Step::kMaxPool:
    case Step::kAvgPool: return pool(call, row, first, images);
    case Step::kBn: return bn(call, row, first, images);
    case Step::kAdd: return add(call, row, first, images);
    case Step::kUpsample: return upsample(call, row, first, images);
    case Step::kGate: return gate(call, row, first, images);
    case Step::kActivation: return activation(call, row, first, images);
    case Step::kCopy: return copy(call, row, first, images);
    default: FASTRES_CHECK(false, kPlan, "a step", "one of this build", static_cast<int64_t>(row.kind));
  }
  return {};
}

// The works of one part of the images, in their order.
std::vector<Work> works_of(const Call& call, const Tensor& program, int64_t images) {
  const auto* rows = static_cast<const PlanRow*>(program.data_ptr());
  const int64_t count = program.numel() / kRowFields;
  std::vector<Work> works;
  for (int64_t at = 0; at < count;) {
    const PlanRow& segment = rows[at++];
    FASTRES_CHECK(segment.kind == Step::kSegment && segment.chunk >= 1 && segment.count >= 0 && segment.count <= count - at,
                  kPlan, "the program", "a list of segments", segment.count);
    for (int64_t first = 0; first < images; first += segment.chunk)
      for (int64_t i = 0; i < segment.count; ++i)
        works.push_back(work_of(call, rows[at + i], first, std::min(segment.chunk, images - first)));
    at += segment.count;
  }
  return works;
}

// With one part, all threads share each piece of work; with several, one thread does all of a part, in its own part of the arena:
// no thread waits for another, and a core reads what it wrote itself.
void run_plan(const Tensor& x, const Tensor& program, const std::vector<Tensor>& constants, const Tensor& arena,
              const std::vector<Tensor>& ys, int64_t parts) {
  for (const Tensor* t : {&x, &program, &arena}) check_cpu(kPlan, "every tensor", *t);
  FASTRES_CHECK(!ys.empty(), kPlan, "the outputs", "at least one", 0);
  const DType dtype = dtype_of(ys[0]);
  for (const Tensor& y : ys) {
    check_cpu(kPlan, "every tensor", y);
    FASTRES_CHECK(dtype_of(y) == dtype && conv_lacks(dtype) == nullptr && element_size(dtype) <= 4 && dtype != DType::kFloat16,
                  kPlan, "an output", "float32, or bfloat16 where the processor multiplies it", show(y.scalar_type()));
    FASTRES_CHECK(y.is_contiguous() && y.dim() > 0 && x.dim() == 4 && y.size(0) == x.size(0), kPlan, "an output",
                  "contiguous, of as many images as the input", show(y.sizes()));
  }
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0 && (dtype_of(x) == dtype || x.scalar_type() == ScalarType::Float), kPlan,
                "the input", "a batch of images", show(x.sizes()));
  FASTRES_CHECK(program.scalar_type() == ScalarType::Long && program.is_contiguous() && program.numel() % kRowFields == 0,
                kPlan, "the program", "whole rows of " << kRowFields << " int64", show(program.sizes()));
  FASTRES_CHECK(arena.scalar_type() == ScalarType::Byte && arena.is_contiguous(), kPlan, "the arena", "contiguous bytes",
                show(arena.scalar_type()));
  FASTRES_CHECK(parts >= 1 && x.size(0) % parts == 0 && arena.numel() % parts == 0, kPlan, "the parts",
                "as many as divide images and arena", parts);
  for (const Tensor& constant : constants)
    FASTRES_CHECK(constant.is_cpu() && constant.is_contiguous(), kPlan, "a constant", "contiguous on cpu",
                  show(constant.sizes()));
  std::atomic<bool> finite{true};
  const int64_t images = x.size(0) / parts, bytes = arena.numel() / parts;
  std::vector<std::vector<Work>> works;
  for (int64_t part = 0; part < parts; ++part) {
    const Call call{x, constants, ys, part * images, static_cast<char*>(arena.data_ptr()) + part * bytes, bytes,
                    parts == 1 ? torch::stable::get_num_threads() : 1, dtype, element_size(dtype), finite};
    works.push_back(works_of(call, program, images));
  }
  if (parts == 1) run_team(works[0]);
  else
    parallel_or_throw(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part)
        for (const Work& work : works[part]) work.run(0, work.units);
    });
  FASTRES_CHECK(finite, kPlan, "x", "finite: 8-bit integers hold neither NaN nor infinity", "values that are not");
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_plan(Tensor x, Tensor program, Tensor[] constants, Tensor arena, Tensor(a!)[] ys, int parts) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_plan", TORCH_BOX(&fastres::cpu::run_plan));
}
