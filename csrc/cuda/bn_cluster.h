// bn_act_train, bn_add_act_train and their backward in one launch where a cluster of blocks holds all of some channels in its
// shared memory: x, and in backward grad_y, are read once.
#pragma once

#include "cuda/bn_act.h"
#include "cuda/bn_act_backward.h"

namespace fastres::cuda {

constexpr int kClusterVec = 8;               // channels of a vector: a byte of a ReLU's mask
constexpr int kClusterBytes = 200 << 10;     // of x, or of x and grad_y, that a block holds at most
constexpr int64_t kClusterBlocks = 128;      // wanted: about as many as a device has multiprocessors, on every device

// A cluster owns a slice of the channels, each of its blocks a share of the rows, of N * H * W; a thread has one vector of the
// slice, of every so many rows.
struct BnClusterPlan {
  int64_t rows, channels;
  int vectors;     // of a slice
  int cluster;     // blocks
  int slots;       // vectors of a thread, at most; 0 where no cluster holds the rows
  int64_t share;   // rows of a block; the last one may have fewer
  int64_t slices;

  int64_t blocks() const { return slices * cluster; }
  int rows_at_once() const { return kThreads / vectors; }
};

// Of the plans that fit, the first with enough blocks, else the first with the most; slices of 64 channels before those of 32
// and 16, small clusters before large ones. What a thread loads in one batch is not divided further. It depends on sizes only,
// and so do the results. vector_bytes: of a vector of all that a block holds.
inline BnClusterPlan bn_cluster_plan(int64_t rows, int64_t channels, int vector_bytes) {
  BnClusterPlan best{};
  const int most = kClusterBytes / kThreads / vector_bytes;
  for (const int vectors : {8, 4, 2}) {
    for (const int cluster : {1, 2, 4, 8}) {
      const int64_t slices = ceil_div(channels, kClusterVec * vectors);
      BnClusterPlan plan{rows, channels, vectors, cluster, 0, ceil_div(rows, cluster), slices};
      if (cluster > 1 && ceil_div(rows, cluster / 2) <= int64_t{kUnroll} * plan.rows_at_once()) break;
      if (ceil_div(plan.share, plan.rows_at_once()) > most) continue;
      plan.slots = static_cast<int>(ceil_div(plan.share, plan.rows_at_once()));
      if (best.slots == 0 || (best.blocks() < kClusterBlocks && plan.blocks() > best.blocks())) best = plan;
    }
  }
  return best;
}

struct BnClusterParams {
  BnClusterPlan plan;
  BnActParams bn;  // without geometry, mean and var
  float* mean;
  float* var;
};

struct BnClusterBackwardParams {
  BnClusterPlan plan;
  BnActBackwardParams bn;  // without geometry and workspaces
};

cudaError_t launch_bn_cluster(const BnClusterParams& params, cudaStream_t stream);
cudaError_t launch_bn_cluster_backward(const BnClusterBackwardParams& params, cudaStream_t stream);

}  // namespace fastres::cuda
