// What the batch-norm kernels share: how a tensor is divided among blocks and threads, and vectors with a value per channel.
#pragma once

#include <algorithm>

#include "common/types.h"
#include "cuda/launch.h"

namespace fastres::cuda {

constexpr int kTileChannels = 256;    // most channels of one block, channels_last
constexpr int kMaskVec = 8;           // elements of a byte of a ReLU's mask
constexpr int kRounds = 2;            // batches of a thread in a pass without sums, see finer()
constexpr int64_t kBlocks = 8 * 132;  // wanted: 8 for each multiprocessor of an H100, and on every device, for the same bits

// One value per channel, in the caller's dtype; data is null where the parameter is absent.
struct ChannelVector {
  const void* data;
  DType dtype;
};

// A block owns a tile of channels and a share of the positions along them; its threads are (x: vectors of the tile,
// y: positions). A position is a pixel (channels_last), or one vector of a plane (contiguous, where a tile is one channel).
struct BnGeometry {
  bool channels_last;
  int vec;             // elements of a vector: 16 bytes, kMaskVec, or 1 where alignment or size forbid vectors
  int64_t channels;
  int64_t plane;       // H * W
  int64_t elements;    // per channel, N * H * W
  int64_t positions;   // per channel
  int64_t tiles;
  int tile_channels;
  int block_x, block_y;
  int64_t share, splits;  // positions per block, blocks along the positions; no split is empty

  int64_t blocks() const { return tiles * splits; }
  int64_t partials() const { return splits * 2 * channels; }  // floats of workspace of a reduction: [splits, 2, channels]
};

// Depends on sizes, vector and alignment only, and so do the results of reductions. batch: positions of a thread at a time.
inline BnGeometry bn_geometry(int vec, bool channels_last, bool aligned, int64_t n, int64_t c, int64_t plane,
                              int batch = kUnroll, int64_t blocks = kBlocks) {
  BnGeometry g{};
  g.channels_last = channels_last;
  g.channels = c;
  g.plane = plane;
  g.elements = n * plane;
  g.vec = aligned && (channels_last ? c : plane) % vec == 0 ? vec : 1;
  if (channels_last) {
    const int64_t vectors = c / g.vec;
    g.tiles = ceil_div(vectors, kTileChannels / g.vec);
    g.block_x = static_cast<int>(ceil_div(vectors, g.tiles));
    g.block_y = kThreads / g.block_x;
    g.tile_channels = g.block_x * g.vec;
    g.positions = g.elements;
  } else {
    g.tiles = c;
    g.tile_channels = 1;
    g.positions = g.elements / g.vec;
    g.block_x = 1;
    g.block_y = static_cast<int>(std::min<int64_t>(kThreads, ceil_div(g.positions, 32) * 32));
  }
  const int64_t round = int64_t{g.block_y} * batch;
  const int64_t wanted = std::max<int64_t>(blocks / g.tiles, 1);
  g.share = ceil_div(ceil_div(g.positions, wanted), round) * round;
  g.splits = ceil_div(g.positions, g.share);
  return g;
}

// The same for a pass without sums, whose results depend on no division: blocks so small that a device does not wait long for
// the last ones.
inline BnGeometry finer(BnGeometry g) {
  g.share = std::min(g.share, int64_t{g.block_y} * kUnroll * kRounds);
  g.splits = ceil_div(g.positions, g.share);
  return g;
}

}  // namespace fastres::cuda
