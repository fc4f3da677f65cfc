// Statistics of sets of numbers: a thread builds its own in float, one value at a time; they are merged in double, so that
// digits that cancel between sets are not lost.
#pragma once

#include <cmath>

#include "common/epilogue.h"

namespace fastres::cuda {

// IEEE square root and division: an approximation would cost digits that the output dtype has.
FASTRES_HD float inverse_std(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// Count, sums and sums of squares of kLanes sets of the same size, of numbers no farther from 0 than double has digits for:
// what is left of x behind its pivot, see bn_statistics.
template <int kLanes>
struct MomentSums {
  double count;
  double sum[kLanes];
  double square[kLanes];

  FASTRES_HD void merge(const MomentSums& other) {
    count += other.count;
    for (int j = 0; j < kLanes; ++j) {
      sum[j] += other.sum[j];
      square[j] += other.square[j];
    }
  }

  FASTRES_HD double mean(int j) const { return sum[j] / count; }
  FASTRES_HD double m2(int j) const { return square[j] - sum[j] * mean(j); }
};

// Count, mean and sum of squared deviations of kLanes sets of the same size.
template <int kLanes>
struct Moments {
  float count;
  float mean[kLanes];
  float m2[kLanes];

  // Welford: a constant set keeps its mean exactly and m2 at 0.
  FASTRES_HD void add(const float (&x)[kLanes]) {
    count += 1.0f;
    const float weight = 1.0f / count;
    for (int j = 0; j < kLanes; ++j) {
      const float delta = x[j] - mean[j];
      mean[j] = fmaf(delta, weight, mean[j]);
      m2[j] = fmaf(delta, x[j] - mean[j], m2[j]);
    }
  }

  FASTRES_HD MomentSums<kLanes> sums() const {
    MomentSums<kLanes> out;
    out.count = count;
    for (int j = 0; j < kLanes; ++j) {
      out.sum[j] = out.count * mean[j];
      out.square[j] = m2[j] + out.sum[j] * mean[j];
    }
    return out;
  }

  // Those of all lanes as one set.
  FASTRES_HD MomentSums<1> folded() const {
    MomentSums<1> all{};
    for (int j = 0; j < kLanes; ++j) all.merge(Moments<1>{count, {mean[j]}, {m2[j]}}.sums());
    return all;
  }
};

// Sums of dz and of dz * (x - mean) of kLanes sets.
template <int kLanes, typename T = float>
struct GradientSums {
  T dz[kLanes];
  T dzx[kLanes];

  FASTRES_HD GradientSums<kLanes, double> wide() const {
    GradientSums<kLanes, double> out;
    for (int j = 0; j < kLanes; ++j) out.dz[j] = dz[j], out.dzx[j] = dzx[j];
    return out;
  }

  FASTRES_HD GradientSums<1, double> folded() const {
    GradientSums<1, double> all{};
    for (int j = 0; j < kLanes; ++j) all.dz[0] += dz[j], all.dzx[0] += dzx[j];
    return all;
  }

  FASTRES_HD void merge(const GradientSums& other) {
    for (int j = 0; j < kLanes; ++j) {
      dz[j] += other.dz[j];
      dzx[j] += other.dzx[j];
    }
  }
};

}  // namespace fastres::cuda
