// Formula: mean = sum(x) / n, var = sum((x - mean)^2) / n; y = act((x - mean) * scale + bias [+ residual]), scale = weight /
// sqrt(var + eps).
// Layout: channels_last; a cluster owns a slice of the channels, its blocks shares of the rows (bn_cluster.h).
// Bytes per element: x and residual are read once, y is written once, and the mask, an eighth of a byte.
// Accumulate type: of x - pivot, float (Welford) in a thread, double between threads and blocks; y is rounded once.
// Invariants: fixed order whatever the device; a constant channel has var == 0 exactly; var is not negative; no block ends
// while another of its cluster may read its memory.
#include "cuda/device/bn_cluster.cuh"

namespace fastres::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kPivotRows = 8;
constexpr int kPivotRow = kAffineRows;  // of the table

// What a channel is measured from, as in bn_statistics: the mean of its first values where that is far from zero, else 0.
__device__ __forceinline__ float pivot_of(const float (&x)[kPivotRows]) {
  float mean = 0.0f, var = 0.0f;
#pragma unroll
  for (int i = 0; i < kPivotRows; ++i) mean += x[i] * (1.0f / kPivotRows);
#pragma unroll
  for (int i = 0; i < kPivotRows; ++i) var += (x[i] - mean) * (x[i] - mean) * (1.0f / kPivotRows);
  return mean * mean > 16.0f * var ? mean : 0.0f;
}

// The pivots of a thread's channels: of the tensor's first rows, the same in all blocks.
template <typename scalar_t>
class Pivots {
 public:
  __device__ Pivots(const BnClusterPlan& plan, const Place& place, const scalar_t* x) {
    if (!place.has_channel(plan)) return;
#pragma unroll
    for (int i = 0; i < kPivotRows; ++i)
      rows_[i] = load<kClusterVec>(x + (i < plan.rows ? i * plan.channels : 0) + place.channel);
  }
  __device__ void find(float (&pivot)[kClusterVec]) const {
#pragma unroll
    for (int j = 0; j < kClusterVec; ++j) {
      float values[kPivotRows];
#pragma unroll
      for (int i = 0; i < kPivotRows; ++i) values[i] = to_float(rows_[i].v[j]);
      pivot[j] = pivot_of(values);
    }
  }

 private:
  Vec<scalar_t, kClusterVec> rows_[kPivotRows];
};

// The statistics of the thread's own channel, and what normalises by them into the table.
__device__ __forceinline__ void finish(const BnClusterParams& p, ClusterShared& s, const OwnChannel& own, int rank,
                                       const MomentSums<1>& whole) {
  if (!own.is_first) return;
  const float mean = static_cast<float>(s.table[kPivotRow][own.in_slice] + whole.mean(0));
  const float var = static_cast<float>(gpu_relu(whole.m2(0) / static_cast<double>(p.plan.rows)));
  s.table[kMean][own.in_slice] = mean;
  s.table[kScale][own.in_slice] = channel_value(p.bn.weight, own.channel, 1.0f) * inverse_std(var, p.bn.eps);
  s.table[kBias][own.in_slice] = channel_value(p.bn.bias, own.channel, 0.0f);
  if (rank > 0) return;
  p.mean[own.channel] = mean;
  p.var[own.channel] = var;
}

template <typename scalar_t>
__device__ __forceinline__ MomentSums<1> statistics(const BnClusterParams& p, ClusterShared& s, const Place& place,
                                                    const OwnChannel& own, Held<scalar_t>& held) {
  const auto* x = static_cast<const scalar_t*>(p.bn.x);
  const Pivots<scalar_t> first(p.plan, place, x);
  Arrivals arrivals(place.count, [&](int slot) { held.copy(slot, x + place.at(slot)); });
  float pivot[kClusterVec];
  first.find(pivot);

  // A thread's own vectors.
  Moments<kClusterVec> moments{};
  arrivals.for_each(
      place, [](int, int) {},
      [&](int, int slot) {
        const auto x_in = held.get(slot);
        float values[kClusterVec];
#pragma unroll
        for (int j = 0; j < kClusterVec; ++j) values[j] = to_float(x_in.v[j]) - pivot[j];
        moments.add(values);
      });
#pragma unroll
  for (int j = 0; j < kClusterVec; ++j) {
    s.sums[0][j][threadIdx.x] = moments.mean[j];
    s.sums[1][j][threadIdx.x] = moments.m2[j];
    if (place.row == 0) s.table[kPivotRow][place.vector * kClusterVec + j] = pivot[j];
  }
  s.counts[threadIdx.x] = moments.count;

  // Those of the cluster.
  return sums_of_cluster<MomentSums<1>>(p.plan, s, own, [&](int thread, int lane) {
    return Moments<1>{s.counts[thread], {s.sums[0][lane][thread]}, {s.sums[1][lane][thread]}}.sums();
  });
}

#endif  // 9.0

template <typename scalar_t, bool kAdd>
__global__ void __launch_bounds__(kThreads, 1) bn_cluster_kernel(const __grid_constant__ BnClusterParams p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint8_t* memory = dynamic_memory();
  ClusterShared& s = *reinterpret_cast<ClusterShared*>(memory);
  Held<scalar_t> held(memory + sizeof(ClusterShared));
  const Place place(p.plan);
  const OwnChannel own(p.plan);
  let_the_next_kernel_start();
  wait_for_the_kernel_before();
  finish(p, s, own, place.rank, statistics(p, s, place, own, held));
  float affine[kAffineRows][kClusterVec];
  read_table(s, place, affine);

  const auto* residual = static_cast<const scalar_t*>(p.bn.residual);
  auto* y = static_cast<scalar_t*>(p.bn.y);
  typename Held<scalar_t>::Vector x_in[kClusterBatch], residual_in[kClusterBatch];
  for_each_held(
      place,
      [&](int i, int slot) {
        x_in[i] = held.get(slot);
        if constexpr (kAdd) residual_in[i] = load<kClusterVec>(residual + place.at(slot));
      },
      [&](int i, int slot) {
        float out[kClusterVec];
#pragma unroll
        for (int j = 0; j < kClusterVec; ++j) {
          float z = normalise(to_float(x_in[i].v[j]), affine[kMean][j], affine[kScale][j], affine[kBias][j]);
          if constexpr (kAdd) z += to_float(residual_in[i].v[j]);
          out[j] = p.bn.relu ? gpu_relu(z) : z;
        }
        store(y + place.at(slot), out);
        if constexpr (kAdd)
          if (p.bn.relu) store_mask<scalar_t>(p.bn.mask, place.at(slot), out);
      });
  wait_for_cluster(p.plan.cluster);
#endif
}

cudaError_t launch_bn_cluster(const BnClusterParams& params, cudaStream_t stream) {
  return with_dtype(params.bn.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const auto kernel = params.bn.residual == nullptr ? bn_cluster_kernel<scalar_t, false> : bn_cluster_kernel<scalar_t, true>;
    return launch_plan<scalar_t>(kernel, params, 1, stream);
  });
}

}  // namespace fastres::cuda
