// Bindings of bn_act_maxpool, bn_act_maxpool_train and bn_act_maxpool_backward: checks, outputs, launches, registration.
#include "cuda/bn_act_maxpool.h"

#include "binding/window.h"
#include "cuda/bn_host.h"

namespace fastres::cuda {
namespace {

// Checks x and the window. Kernels count rows and columns in 32 bits, elements in 64.
PoolWindow check_call(const char* op, const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding) {
  check_cuda(op, "x", x);
  check_activations(op, {{"x", x}}, false);
  FASTRES_CHECK(x.size(2) < (int64_t{1} << 30) / x.size(3), op, "x", "of planes below 2^30 elements", show(x.sizes()));
  return check_window(op, x, kernel, stride, padding, kNoTap - 1);
}

// Divides a plane's positions among blocks; vectors need all pointers aligned.
BnGeometry divide(const Tensor& x, int64_t plane, std::initializer_list<const void*> pointers, int batch = kUnroll,
                  int64_t blocks = kBlocks) {
  const bool channels_last = memory_format(x) == Format::channels_last;
  const bool vectors = channels_last && std::all_of(pointers.begin(), pointers.end(), is_aligned);
  return bn_geometry(vector_of(x), channels_last, vectors, x.size(0), x.size(1), plane, batch, blocks);
}

struct Division {
  Pool pool;
  BnGeometry geometry;  // of the pixels of y, or of strips
};

// Strips, for a ReLU's windows of 3x3 with stride 2 and padding 1, are short where long ones would be too few for a device; a thread has one where that leaves not too many partials.
Division divide(const Tensor& x, const PoolWindow& window, bool relu, std::initializer_list<const void*> pointers) {
  const auto pair = [](int64_t h, int64_t w) { return PlaneSize{static_cast<int>(h), static_cast<int>(w)}; };
  const auto step = [](int64_t value) { return std::min<int64_t>(value, 1 << 30); };  // beyond the plane all are alike
  const auto is = [](const PlaneSize& size, int value) { return size.h == value && size.w == value; };
  Pool pool{pair(x.size(2), x.size(3)), pair(window.out[0], window.out[1]), pair(window.kernel[0], window.kernel[1]),
            pair(step(window.stride[0]), step(window.stride[1])), pair(window.padding[0], window.padding[1]), 0, 0};
  const BnGeometry pixels = divide(x, window.out[0] * window.out[1], pointers);
  const bool is_stem = relu && is(pool.kernel, 3) && is(pool.stride, 2) && is(pool.padding, 1);
  if (pixels.vec == 1 || !is_stem || x.size(2) * x.size(3) >= (int64_t{1} << 31) / x.size(1)) return {pool, pixels};
  int64_t strips = ceil_div(pool.out.h, kMostStripRows);
  while (strips < pool.out.h && 4 * x.size(0) * strips * pool.out.w * pixels.tiles < kBlocks * pixels.block_y) strips *= 2;
  pool.strip_rows = static_cast<int>(ceil_div(pool.out.h, std::min<int64_t>(strips, pool.out.h)));
  pool.strips = static_cast<int>(ceil_div(pool.out.h, pool.strip_rows));
  return {pool, divide(x, int64_t{pool.strips} * pool.out.w, pointers, 1, 2 * kBlocks)};
}

Tensor apply(const Launch& launch, const Tensor& x, const PoolWindow& window, const BnArguments& args, double eps,
             bool relu) {
  Tensor y = empty_activation(pooled_sizes(x, window), memory_format(x), x);
  const Division division = divide(x, window, relu, {x.data_ptr()});
  const BnActParams bn{division.geometry, dtype_of(x),  relu,        static_cast<float>(eps),
                       x.data_ptr(),      nullptr,      y.data_ptr(), args.weight,
                       args.bias,         args.mean,    args.var};
  launch(launch_bn_act_maxpool, BnActMaxpoolParams{bn, division.pool});
  return y;
}

Tensor bn_act_maxpool(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                      const Tensor& var, double eps, const Text& act, const Ints& kernel_size, const Ints& stride,
                      const Ints& padding) {
  const char* op = "bn_act_maxpool";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  return apply(launch, x, window, BnArguments(op, x, weight, bias, mean, var), eps, relu);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_train(const Tensor& x, const OptionalTensor& weight,
                                                        const OptionalTensor& bias, double eps, const Text& act,
                                                        const Ints& kernel_size, const Ints& stride,
                                                        const Ints& padding) {
  const char* op = "bn_act_maxpool_train";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const Statistics found = batch_statistics(launch, fastres::cuda::divide(op, {{"x", x}}), x);
  const BnArguments args(op, x, weight, bias, found.mean, found.var);
  return {apply(launch, x, window, args, eps, relu), found.mean, found.var};
}

std::tuple<Tensor, Tensor, Tensor> bn_act_maxpool_backward(const Tensor& grad_y, const Tensor& x,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           const Tensor& mean, const Tensor& var, double eps,
                                                           const Text& act, bool training,
                                                           const Ints& kernel_size, const Ints& stride,
                                                           const Ints& padding) {
  const char* op = "bn_act_maxpool_backward";
  const PoolWindow window = check_call(op, x, kernel_size, stride, padding);
  check_pooled(op, "grad_y", grad_y, x, window, memory_format(x));
  const bool relu = is_relu(op, act);
  const Launch launch(op, x);
  const BnArguments args(op, x, weight, bias, mean, var);
  const Tensor taps = empty_vector(grad_y.numel(), ScalarType::Byte, x);
  BnActMaxpoolBackwardParams params{};
  params.taps = static_cast<uint8_t*>(taps.data_ptr());
  const Division division = divide(x, window, relu, {x.data_ptr(), grad_y.data_ptr()});
  const BnGeometry pixels = divide(x, x.size(2) * x.size(3), {x.data_ptr(), grad_y.data_ptr()});
  params.pool = division.pool;
  params.input = division.pool.strips > 0 ? division.geometry : pixels;
  params.bn.geometry = division.geometry;
  params.bn.geometry.elements = pixels.elements;
  params.bn.relu = relu;
  params.bn.training = training;
  params.bn.eps = static_cast<float>(eps);
  params.bn.grad_y = grad_y.data_ptr();
  const Gradients found = prepare_gradients(params.bn, x, args);
  launch(launch_bn_act_maxpool_backward, params);
  return {found.x, found.weight, found.bias};
}

}  // namespace
}  // namespace fastres::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastres_C, m) {
  m.def("cuda_bn_act_maxpool(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, str act,"
        " int[] kernel_size, int[] stride, int[] padding) -> Tensor");
  m.def("cuda_bn_act_maxpool_train(Tensor x, Tensor? weight, Tensor? bias, float eps, str act, int[] kernel_size,"
        " int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
  m.def("cuda_bn_act_maxpool_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var,"
        " float eps, str act, bool training, int[] kernel_size, int[] stride, int[] padding) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_C, CUDA, m) {
  m.impl("cuda_bn_act_maxpool", TORCH_BOX(&fastres::cuda::bn_act_maxpool));
  m.impl("cuda_bn_act_maxpool_train", TORCH_BOX(&fastres::cuda::bn_act_maxpool_train));
  m.impl("cuda_bn_act_maxpool_backward", TORCH_BOX(&fastres::cuda::bn_act_maxpool_backward));
}
