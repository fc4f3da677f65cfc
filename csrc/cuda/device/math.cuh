// Statistics of sets of numbers: built one value at a time, and merged. Structs of floats only (see reduce.cuh).
#pragma once

#include <cmath>

#include "common/epilogue.h"

namespace fastres::cuda {

// IEEE square root and division: an approximation would cost digits that the output dtype has.
FASTRES_HD float inverse_std(float var, float eps) { return 1.0f / sqrtf(var + eps); }

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

  // Chan: the same for whole sets.
  FASTRES_HD void merge(const Moments& other) {
    if (other.count == 0.0f) return;
    if (count == 0.0f) {
      *this = other;
      return;
    }
    const float total = count + other.count;
    const float weight = other.count / total;
    for (int j = 0; j < kLanes; ++j) {
      const float delta = other.mean[j] - mean[j];
      mean[j] = fmaf(delta, weight, mean[j]);
      m2[j] += fmaf(delta * delta, count * weight, other.m2[j]);
    }
    count = total;
  }

  // All lanes as one set.
  FASTRES_HD Moments<1> folded() const {
    Moments<1> all{count, {mean[0]}, {m2[0]}};
    for (int j = 1; j < kLanes; ++j) all.merge({count, {mean[j]}, {m2[j]}});
    return all;
  }
};

// Sums of dz and of dz * (x - mean) of kLanes sets.
template <int kLanes>
struct GradientSums {
  float dz[kLanes];
  float dzx[kLanes];

  FASTRES_HD void merge(const GradientSums& other) {
    for (int j = 0; j < kLanes; ++j) {
      dz[j] += other.dz[j];
      dzx[j] += other.dzx[j];
    }
  }

  FASTRES_HD GradientSums<1> folded() const {
    GradientSums<1> all{{dz[0]}, {dzx[0]}};
    for (int j = 1; j < kLanes; ++j) all.merge({{dz[j]}, {dzx[j]}});
    return all;
  }
};

}  // namespace fastres::cuda
