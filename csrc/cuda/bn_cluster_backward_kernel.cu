// Formula: dz = grad_y [+ grad_y2] where act, or the mask, passes it; grad_bias = sum(dz), grad_weight = sum(dz * xhat);
// grad_x = see normalise_grad; grad_residual = dz.
// Layout: channels_last; a cluster owns a slice of the channels, its blocks shares of the rows (bn_cluster.h).
// Bytes per element: x, grad_y, grad_y2 and the mask are read once, grad_x and grad_residual are written once.
// Accumulate type: float in a thread, double between threads and blocks; dz is exact without grad_y2; grad_x is rounded once.
// Invariants: the mask is that of bn_act, bit for bit; no division by weight, which may be 0; fixed order whatever the device;
// no block ends while another of its cluster may read its memory.
#include "cuda/device/bn_cluster.cuh"

namespace fastres::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Rows of the table beyond those of the affine part.
enum GradientRow { kMeanDz = kAffineRows, kSlope, kGradientRows };

// The gradients of the thread's own channel, and what grad_x is made with into the table.
__device__ __forceinline__ void finish(const BnClusterBackwardParams& p, ClusterShared& s, const OwnChannel& own, int rank,
                                       const GradientSums<1, double>& whole) {
  if (!own.is_first) return;
  const BnActBackwardParams& bn = p.bn;
  const double invstd = 1.0 / sqrt(double{channel_value(bn.var, own.channel, 1.0f)} + bn.eps);
  const double grad_weight = whole.dzx[0] * invstd, elements = static_cast<double>(p.plan.rows);
  s.table[kMeanDz][own.in_slice] = static_cast<float>(whole.dz[0] / elements);
  s.table[kSlope][own.in_slice] = static_cast<float>(grad_weight * invstd / elements);
  if (rank > 0) return;
  set_channel_value(bn.grad_weight, bn.grad_weight_dtype, own.channel, static_cast<float>(grad_weight));
  set_channel_value(bn.grad_bias, bn.grad_bias_dtype, own.channel, static_cast<float>(whole.dz[0]));
}

// x and grad_y of a block, as it holds them; at the end of a residual block dz takes grad_y's place.
template <typename scalar_t>
struct HeldPair {
  Held<scalar_t> x, grad_y;

  __device__ HeldPair(const BnClusterPlan& plan, uint8_t* memory)
      : x(memory), grad_y(memory + plan.slots * kThreads * kClusterVec * sizeof(scalar_t)) {}
};

// kAdd: at the end of a residual block. kTwo: the gradient of y comes in two parts.
template <typename scalar_t, bool kAdd, bool kTwo>
__device__ __forceinline__ GradientSums<1, double> gradient_sums(const BnClusterBackwardParams& p, ClusterShared& s,
                                                                 const Place& place, const OwnChannel& own,
                                                                 HeldPair<scalar_t>& held) {
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const auto* grad_y = static_cast<const scalar_t*>(p.bn.grad_y);
  const auto* grad_y2 = static_cast<const scalar_t*>(p.bn.grad_y2);
  auto* grad_residual = static_cast<scalar_t*>(p.bn.grad_residual);
  Arrivals arrivals(place.count, [&](int slot) {
    held.x.copy(slot, x + place.at(slot));
    held.grad_y.copy(slot, grad_y + place.at(slot));
  });
  if (own.is_first) {
    float entry[kAffineRows];
    fill_affine(p.bn, own.channel, entry);
#pragma unroll
    for (int row = 0; row < kAffineRows; ++row) s.table[row][own.in_slice] = entry[row];
  }
  float affine[kAffineRows][kClusterVec];
  read_table(s, place, affine);

  // A thread's own vectors.
  GradientSums<kClusterVec> sums{};
  typename Held<scalar_t>::Vector second_in[kClusterBatch];
  unsigned mask_in[kClusterBatch];
  arrivals.for_each(
      place,
      [&](int i, int slot) {
        if constexpr (kTwo) second_in[i] = load<kClusterVec>(grad_y2 + place.at(slot));
        if constexpr (kAdd) mask_in[i] = load_mask(p.bn.mask, place.at(slot), p.bn.relu);
      },
      [&](int i, int slot) {
        const auto x_in = held.x.get(slot), grad_in = held.grad_y.get(slot);
        float dz[kClusterVec];
#pragma unroll
        for (int j = 0; j < kClusterVec; ++j) {
          const float x_j = to_float(x_in.v[j]);
          float grad = to_float(grad_in.v[j]);
          if constexpr (kTwo) grad += to_float(second_in[i].v[j]);
          if constexpr (kAdd) {
            dz[j] = mask_in[i] >> j & 1 ? grad : 0.0f;
          } else {
            dz[j] = masked<scalar_t>(grad, normalise(x_j, affine[kMean][j], affine[kScale][j], affine[kBias][j]), p.bn.relu);
          }
          sums.dz[j] += dz[j];
          sums.dzx[j] = fmaf(dz[j], x_j - affine[kMean][j], sums.dzx[j]);
        }
        if constexpr (kAdd) {
          const auto out = rounded<scalar_t>(dz);
          held.grad_y.set(slot, out);
          store(grad_residual + place.at(slot), out);
        }
      });
#pragma unroll
  for (int j = 0; j < kClusterVec; ++j) {
    s.sums[0][j][threadIdx.x] = sums.dz[j];
    s.sums[1][j][threadIdx.x] = sums.dzx[j];
  }

  // Those of the cluster.
  return sums_of_cluster<GradientSums<1, double>>(p.plan, s, own, [&](int thread, int lane) {
    return GradientSums<1, double>{{s.sums[0][lane][thread]}, {s.sums[1][lane][thread]}};
  });
}

#endif  // 9.0

template <typename scalar_t, bool kAdd, bool kTwo>
__global__ void __launch_bounds__(kThreads, 1)
    bn_cluster_backward_kernel(const __grid_constant__ BnClusterBackwardParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint8_t* memory = dynamic_memory();
  ClusterShared& s = *reinterpret_cast<ClusterShared*>(memory);
  HeldPair<scalar_t> held(p.plan, memory + sizeof(ClusterShared));
  const Place place(p.plan);
  const OwnChannel own(p.plan);
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  finish(p, s, own, place.rank, gradient_sums<scalar_t, kAdd, kTwo>(p, s, place, own, held));
  float table[kGradientRows][kClusterVec];
  read_table(s, place, table);

  auto* grad_x = static_cast<scalar_t*>(p.bn.grad_x);
  for_each_held(
      place, [](int, int) {},
      [&](int, int slot) {
        const auto x_in = held.x.get(slot), grad_in = held.grad_y.get(slot);
        float dx[kClusterVec];
#pragma unroll
        for (int j = 0; j < kClusterVec; ++j) {
          const float mean = table[kMean][j], scale = table[kScale][j], x_j = to_float(x_in.v[j]);
          float dz = to_float(grad_in.v[j]);
          if constexpr (!kAdd) dz = masked<scalar_t>(dz, normalise(x_j, mean, scale, table[kBias][j]), p.bn.relu);
          dx[j] = normalise_grad(dz, x_j, mean, scale, table[kMeanDz][j], table[kSlope][j]);
        }
        store(grad_x + place.at(slot), dx);
      });
  wait_for_cluster(p.plan.cluster);
#endif
}

cudaError_t launch_bn_cluster_backward(const BnClusterBackwardParams& params, cudaStream_t stream) {
  return with_dtype(params.bn.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    auto kernel = bn_cluster_backward_kernel<scalar_t, false, false>;
    if (params.bn.grad_residual != nullptr)
      kernel = params.bn.grad_y2 == nullptr ? bn_cluster_backward_kernel<scalar_t, true, false>
                                            : bn_cluster_backward_kernel<scalar_t, true, true>;
    return launch_plan<scalar_t>(kernel, params, 2, stream);
  });
}

}  // namespace fastres::cuda
