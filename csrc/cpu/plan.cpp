// Binding of a frozen network: checks that a program stays within its memory, then runs it step by step.
#include "cpu/plan.h"

#include <sys/mman.h>

#include "cpu/add_act.h"
#include "cpu/conv_host.h"
#include "cpu/plan_call.h"

namespace fastres::cpu {
namespace {

void pad(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const PadSource source(call, row, first, images, call.size);
  run_pad({call.size, source.x, call.at(row.y, first, images, padded_elements(row) * call.size), images, row.channels, row.out_h,
           row.out_w, source.image_step, source.channel_step, source.row_step, source.pixel_step, row.out_channels, row.pad_h,
           row.pad_w});
}

void conv(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  ConvArgs args = conv_args(call, row, first, images, call.size, call.size);
  const int64_t depth = row.winograd ? kWinogradPoints * row.run : row.kernel_h * row.kernel_w * row.run;
  const Tensor &weight = call.constant(row.weight), &bias = call.constant(row.bias);
  FASTRES_CHECK(bias.scalar_type() == ScalarType::Float && bias.numel() == row.out_channels, kPlan, "a bias",
                "float32, one for each output channel", show(bias.sizes()));
  FASTRES_CHECK(dtype_of(weight) == call.dtype &&
                    weight.numel() * call.size == packed_words(row.out_channels, depth) * kWordBytes,
                kPlan, "weights", "packed for their convolution", show(weight.sizes()));
  FASTRES_CHECK(!row.winograd || (call.dtype == DType::kFloat32 && row.channels % conv_tile().lanes == 0 && row.run == row.channels &&
                                  row.kernel_h * row.kernel_w == 9 && row.kernel_h == 3 &&
                                  row.stride_h * row.stride_w * row.dilation_h * row.dilation_w == 1),
                kPlan, "a convolution by Winograd", "3x3, stride 1, float32, of channels in whole vectors", row.channels);
  args.weight = weight.data_ptr(), args.bias = static_cast<const float*>(bias.data_ptr());
  row.winograd ? run_winograd(args) : run_conv(args);
}

void pool(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const char* x = call.at(row.x, first, images, row.height * row.width * row.channels * call.size);
  char* y = call.at(row.y, first, images, row.out_h * row.out_w * row.channels * call.size);
  check_windows(row);
  const PoolArgs args{call.dtype, x, y, images, row.channels, row.height, row.width, row.out_h, row.out_w,
                      row.kernel_h, row.kernel_w, row.stride_h, row.stride_w, row.pad_h, row.pad_w};
  const int64_t grain = std::max<int64_t>(1, kGrain / (row.width * row.channels));
  parallel_for(0, images * row.out_h, grain, [&](int64_t begin, int64_t end) {
    if (row.kind == Step::kMaxPool) max_pool(args, begin, end);
    else avg_pool(args, begin, end);
  });
}

void bn(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t pixels = row.height * row.width, bytes = pixels * row.channels * call.size;
  const Tensor& constants = call.constant(row.weight);
  FASTRES_CHECK(constants.scalar_type() == ScalarType::Float && constants.numel() == 3 * row.channels, kPlan,
                "a batch norm's constants", "float32, three for each channel", show(constants.sizes()));
  const BnPixelsArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone, call.at(row.x, first, images, bytes),
                          static_cast<const float*>(constants.data_ptr()), call.at(row.y, first, images, bytes), row.channels};
  parallel_for(0, images * pixels, std::max<int64_t>(1, kGrain / row.channels),
               [&](int64_t begin, int64_t end) { bn_pixels(args, begin, end); });
}

void add(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  const int64_t numel = row.out_h * row.out_w * row.out_channels, bytes = numel * call.size;
  const void* b = row.residual.offset == kNone ? nullptr : call.at(row.residual, first, images, bytes);
  const AddActArgs args{call.dtype, row.relu ? Act::kRelu : Act::kNone, false, call.at(row.x, first, images, bytes), b,
                        call.at(row.y, first, images, bytes)};
  parallel_for(0, images * numel, kGrain, [&](int64_t begin, int64_t end) { add_act_forward(args, begin, end); });
}

void run_step(const Call& call, const PlanRow& row, int64_t first, int64_t images) {
  FASTRES_CHECK(std::min({row.channels, row.height, row.width, row.out_channels, row.out_h, row.out_w}) >= 1, kPlan,
                "a step's sizes", "at least 1", row.channels);
  if (row.int8) return run_int8_step(call, row, first, images);
  switch (row.kind) {
    case Step::kPad: return pad(call, row, first, images);
    case Step::kConv: return conv(call, row, first, images);
    case Step::kMaxPool:
    case Step::kAvgPool: return pool(call, row, first, images);
    case Step::kBn: return bn(call, row, first, images);
    case Step::kAdd: return add(call, row, first, images);
    default: FASTRES_CHECK(false, kPlan, "a step", "one of this build", static_cast<int64_t>(row.kind));
  }
}

void run_plan(const Tensor& x, const Tensor& program, const std::vector<Tensor>& constants, const Tensor& arena, const Tensor& y) {
  for (const Tensor* t : {&x, &program, &arena, &y}) check_cpu(kPlan, "every tensor", *t);
  const DType dtype = dtype_of(x);
  FASTRES_CHECK(conv_lacks(dtype) == nullptr && element_size(dtype) <= 4 && dtype != DType::kFloat16, kPlan, "the input",
                "float32, or bfloat16 where the processor multiplies it", show(x.scalar_type()));
  FASTRES_CHECK(x.dim() == 4 && x.numel() > 0 && y.scalar_type() == x.scalar_type() && y.is_contiguous() &&
                    y.size(0) == x.size(0), kPlan, "the input", "a batch of images, as many as outputs", show(x.sizes()));
  FASTRES_CHECK(program.scalar_type() == ScalarType::Long && program.is_contiguous() && program.numel() % kRowFields == 0,
                kPlan, "the program", "whole rows of " << kRowFields << " int64", show(program.sizes()));
  FASTRES_CHECK(arena.scalar_type() == ScalarType::Byte && arena.is_contiguous(), kPlan, "the arena", "contiguous bytes",
                show(arena.scalar_type()));
  for (const Tensor& constant : constants)
    FASTRES_CHECK(constant.is_cpu() && constant.is_contiguous(), kPlan, "a constant", "contiguous on cpu", show(constant.sizes()));
  const Call call{x, constants, arena, y, dtype, element_size(dtype)};
  const auto* rows = static_cast<const PlanRow*>(program.data_ptr());
  const int64_t count = program.numel() / kRowFields, batch = x.size(0);
  for (int64_t at = 0; at < count;) {
    const PlanRow& segment = rows[at++];
    FASTRES_CHECK(segment.kind == Step::kSegment && segment.chunk >= 1 && segment.count >= 0 && segment.count <= count - at,
                  kPlan, "the program", "a list of segments", segment.count);
    for (int64_t first = 0; first < batch; first += segment.chunk)
      for (int64_t i = 0; i < segment.count; ++i)
        run_step(call, rows[at + i], first, std::min(segment.chunk, batch - first));
    at += segment.count;
  }
}

// Fresh memory, in large pages where the system has them: faster to come by, and fewer misses of the address cache.
Tensor large_pages(const Tensor& like, int64_t bytes) {
  FASTRES_CHECK(bytes >= 0, kPlan, "bytes", "at least 0", bytes);
  Tensor memory = empty_vector(bytes, ScalarType::Byte, like);
  constexpr uintptr_t kPage = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice
  return memory;
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_plan(Tensor x, Tensor program, Tensor[] constants, Tensor arena, Tensor(a!) y) -> ()");
  m.def("cpu_large_pages(Tensor like, int bytes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_plan", TORCH_BOX(&fastres::cpu::run_plan));
  m.impl("cpu_large_pages", TORCH_BOX(&fastres::cpu::large_pages));
}
