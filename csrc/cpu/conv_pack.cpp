// Binding of the weights' packing: checks, the order that ConvArgs tells, registration.
#include <algorithm>
#include <atomic>

#include "cpu/conv.h"
#include "cpu/conv_host.h"

namespace fastres::cpu {
namespace {

constexpr const char* kOp = "conv_pack";
constexpr int64_t kTogether = 64;  // input channels taken from each row in turn: lines in a run are fetched ahead

// Weights (out_channels, own, kernel_h, kernel_w), packed in blocks of output channels with zeros for own to `channels`. Steps in
// elements, from one of each to the next.
struct PackArgs {
  const void* weight;
  void* packed;
  int64_t out_channels, own, kernel_h, kernel_w, channels, out_step, channel_step, row_step, col_step;
};

// One block of output channels, from `first` on.
template <typename word_t>
void pack_block(const PackArgs& args, int64_t first) {
  constexpr int64_t kPerWord = kWordBytes / static_cast<int64_t>(sizeof(word_t));
  const int64_t block = conv_tile().channels, lanes = conv_tile().lanes, taps = args.kernel_h * args.kernel_w;
  const int64_t found = std::min(block, args.out_channels - first), width = ceil_div(found, lanes) * lanes;
  const auto* weight = static_cast<const word_t*>(args.weight) + first * args.out_step;
  auto* to = static_cast<word_t*>(args.packed) + first * taps * args.channels;
  for (int64_t begin = 0; begin < args.channels; begin += kTogether)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t k = 0; k < width; ++k) {
        const auto* from = weight + k * args.out_step + tap / args.kernel_w * args.row_step + tap % args.kernel_w * args.col_step;
        for (int64_t c = begin; c < std::min(begin + kTogether, args.channels); ++c) {
          const int64_t place = (tap * args.channels + c) / kPerWord * width + k;
          to[place * kPerWord + c % kPerWord] = k < found && c < args.own ? from[c * args.channel_step] : word_t{0};
        }
      }
}

template <typename word_t>
void pack(const PackArgs& args) {
  const int64_t block = conv_tile().channels;
  parallel_for(0, ceil_div(args.out_channels, block), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack_block<word_t>(args, i * block);
  });
}

void transform(const Tensor& weight, const Tensor& packed) {
  std::atomic<bool> finite{true};  // who packs has looked
  const ConvWeightArgs args{.dtype = DType::kFloat32, .weight = weight.data_ptr(), .packed = static_cast<float*>(packed.data_ptr()),
                            .out_channels = weight.size(0), .channels = weight.size(1), .out_step = weight.stride(0),
                            .channel_step = weight.stride(1), .row_step = weight.stride(2), .col_step = weight.stride(3),
                            .finite = &finite};
  parallel_for(0, ceil_div(args.out_channels, conv_tile().channels) * conv_weight_vectors(args), 2,
               [&](int64_t begin, int64_t end) { conv_transform_weight(args, begin, end); });
}

// Weights (out_channels, channels / groups, kernel_h, kernel_w) as a convolution of so many channels in so many groups reads
// them, each slice of channels (conv_host.h) by itself; with `winograd` transformed.
void conv_pack(const Tensor& weight, const Tensor& packed, int64_t channels, int64_t groups, bool winograd) {
  check_cpu(kOp, "weight", weight);
  const ScalarType dtype = weight.scalar_type();
  const int64_t size = dtype == ScalarType::Char ? 1 : element_size(dtype_of(weight));
  FASTRES_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char, kOp, "weight",
                "float32, bfloat16 or int8", show(dtype));
  FASTRES_CHECK(weight.dim() == 4 && weight.numel() > 0, kOp, "weight", "four-dimensional and not empty", show(weight.sizes()));
  const int64_t out_channels = weight.size(0), own = weight.size(1), taps = weight.size(2) * weight.size(3);
  FASTRES_CHECK(groups >= 1 && channels % groups == 0 && channels / groups >= own && channels / groups * size % kWordBytes == 0,
                kOp, "channels", "whole words of 32 bits for each group, at least " << own, channels);
  const char* lack = groups == 1 ? nullptr : groups_lack(channels, out_channels, groups, size);
  FASTRES_CHECK(lack == nullptr, kOp, "groups", "1, or " << lack, groups);
  FASTRES_CHECK(!winograd || (dtype == ScalarType::Float && groups == 1 && weight.size(2) == 3 && weight.size(3) == 3 &&
                              own == channels && own % conv_tile().lanes == 0),
                kOp, "a weight by Winograd", "of 3x3 kernels in float32, over channels in whole vectors", show(weight.sizes()));
  const int64_t depth = (winograd ? kWinogradPoints : taps) * (channels / groups) * size / kWordBytes;
  check_cpu(kOp, "packed", packed);
  FASTRES_CHECK(packed.scalar_type() == dtype && packed.is_contiguous() &&
                    packed.numel() * size == packed_words(out_channels, depth, groups) * kWordBytes,
                kOp, "packed", "of the weight's dtype, for " << packed_words(out_channels, depth, groups) << " words",
                packed.numel());
  if (winograd) return transform(weight, packed);
  const Slices slices(out_channels, groups);
  for (int64_t i = 0; i < slices.count; ++i) {
    const int64_t first = i * slices.channels, read = channels / groups;
    const PackArgs args{.weight = static_cast<const char*>(weight.data_ptr()) + first * weight.stride(0) * size,
                        .packed = static_cast<char*>(packed.data_ptr()) + i * slice_words(slices.channels, depth) * kWordBytes,
                        .out_channels = std::min(slices.channels, out_channels - first), .own = own,
                        .kernel_h = weight.size(2), .kernel_w = weight.size(3), .channels = read,
                        .out_step = weight.stride(0), .channel_step = weight.stride(1), .row_step = weight.stride(2),
                        .col_step = weight.stride(3)};
    size == 4 ? pack<uint32_t>(args) : size == 2 ? pack<uint16_t>(args) : pack<uint8_t>(args);
  }
}

}  // namespace
}  // namespace fastres::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cpu_conv_pack(Tensor weight, Tensor(a!) packed, int channels, int groups, bool winograd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CPU, m) {
  m.impl("cpu_conv_pack", TORCH_BOX(&fastres::cpu::conv_pack));
}
