// Statistics of sets of numbers: a thread builds its own in float, one value at a time; they are merged in double, so that
// digits that cancel between sets are not lost.
#pragma once

#include <cmath>

#include "common/epilogue.h"

namespace fastres::cuda {

// IEEE square root and division: an approximation would cost digits that the output dtype has.
FASTRES_HD float inverse_std(float var, float eps) { return 1.0f / sqrtf(var + eps); }

// Count, mean and sum of squared deviations of kLanes sets of the same size.
template <int kLanes, typename T = float>
struct Moments {
  T count;
  T mean[kLanes];
  T m2[kLanes];

  // Welford: a constant set keeps its mean exactly and m2 at 0.
  FASTRES_HD void add(const T (&x)[kLanes]) {
    count += 1.0f;
    const T weight = 1.0f / count;
    for (int j = 0; j < kLanes; ++j) {
      const T delta = x[j] - mean[j];
      mean[j] = fmaf(delta, weight, mean[j]);
      m2[j] = fmaf(delta, x[j] - mean[j], m2[j]);
    }
  }

  FASTRES_HD Moments<kLanes, double> wide() const {
    Moments<kLanes, double> out{count, {}, {}};
    for (int j = 0; j < kLanes; ++j) out.mean[j] = mean[j], out.m2[j] = m2[j];
    return out;
  }

  // All lanes as one set.
  FASTRES_HD Moments<1, double> folded() const {
    Moments<1, double> all{double{count} * kLanes, {0.0}, {0.0}};
    for (int j = 0; j < kLanes; ++j) all.mean[0] += mean[j];
    all.mean[0] *= 1.0 / kLanes;
    for (int j = 0; j < kLanes; ++j) {
      const double delta = mean[j] - all.mean[0];
      all.m2[0] += m2[j] + count * delta * delta;
    }
    return all;
  }

  // Chan: the same for whole sets.
  FASTRES_HD void merge(const Moments& other) {
    if (other.count == 0.0) return;
    if (count == 0.0) {
      *this = other;
      return;
    }
    const T total = count + other.count;
    const T weight = other.count / total;
    for (int j = 0; j < kLanes; ++j) {
      const T delta = other.mean[j] - mean[j];
      mean[j] += delta * weight;
      m2[j] += other.m2[j] + delta * delta * (count * weight);
    }
    count = total;
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
