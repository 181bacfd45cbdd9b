// How the kernels of the attention head divide a batch among blocks, and what they keep in the caller's workspace.
// Nothing here depends on the GPU but how many samples are worked on at a time and, on one that holds fewer than 48 blocks
// at a time, into how many parts channels are divided: sums have the same order on all others.
// Plain C++.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../common/math.h"
#include "../../cuda/arena.h"
#include "../head.h"

namespace dan_fast {

struct HeadSizes {
  int64_t batch, channels, positions, hidden, units;  // hidden: of spatial attention; units: of channel attention
};

// What every device gives without an opt-in, and two blocks fit a multiprocessor of 100 KB.
constexpr int64_t kHeadSharedBytes = 48 << 10;
constexpr int kHeadThreads = 256;

// Of the kernels that find gradients of weights, whose blocks take what there is in turn: a few for each
// multiprocessor.
constexpr int kHeadWeightBlocks = 512;

// Enough for 2048 x 24 x 8 in float32 to be held whole; with more, blocks would read far more of each other's sums than
// of the map.
constexpr int64_t kHeadMaxParts = 48;

// Channels of a thread in a pass over positions.
constexpr int kHeadRounds = 2;

// Numbers that a block hands around in a product of the bottleneck, see head_bottleneck.cuh.
constexpr int64_t kHeadProductNumbers = 128;

// A block's share of a sample is `range` channels; it holds `tile_channels` x `tile_positions` of it at a time.
struct HeadPlan {
  int64_t tile_channels, tile_positions;
  int pitch;             // of the tile, see Tile
  int64_t range;
  int64_t parts;         // blocks a sample
  int64_t groups;        // samples at a time
  int64_t tile_offset;   // bytes of shared memory before the tile, as is the next
  int64_t scratch_offset;
  int64_t scratch_size;  // numbers
  bool scratch_in_shared;
  int64_t shared_bytes;

  int64_t blocks() const { return parts * groups; }
};

struct HeadPlanning {
  int64_t element, statistic;  // bytes of S, of A
  bool channels_last;
  int64_t threads, shared_limit;

  int64_t pack() const { return 16 / element; }

  // An odd number of 16 bytes: threads at neighbouring positions read a pack of channels each without a conflict.
  int64_t pitch(int64_t channels, int64_t positions) const {
    return channels_last ? (round_up(channels * element, 16) / 16 | 1) * pack() : positions;
  }

  int64_t tile_bytes(int64_t channels, int64_t positions) const {
    return round_up(pitch(channels, positions) * (channels_last ? positions : channels) * element, 16);
  }

  // Of `positions` and `channels` as many as fit beside `fixed(channels, positions)` bytes, but a pack of channels at
  // least.
  template <typename Fixed>
  void fit(HeadPlan* plan, int64_t channels, int64_t positions, const Fixed& fixed) const {
    int64_t p = std::min(positions, threads);
    const auto bytes = [&](int64_t c) { return fixed(c, p) + tile_bytes(c, p); };
    while (p > 1 && bytes(pack()) > shared_limit) p = (p + 1) / 2;
    int64_t c = pack();
    while (c < channels && bytes(c + pack()) <= shared_limit) c += pack();
    plan->tile_channels = c;
    plan->tile_positions = p;
  }

  void set_pitch(HeadPlan* plan) const {
    plan->pitch = static_cast<int>(pitch(plan->tile_channels, plan->tile_positions));
    plan->shared_bytes = plan->tile_offset + tile_bytes(plan->tile_channels, plan->tile_positions);
  }

  // `scratch`: numbers that a block needs for the spatial attention of a sample; `weights`: numbers it holds a channel;
  // `total`: bytes that a thread hands on when threads add up; `handed`: bytes it needs there for other purposes;
  // `resident`: blocks that run at once.
  HeadPlan divide(
      const HeadSizes& sizes, int64_t scratch, int64_t weights, int64_t total, int64_t handed,
      int64_t resident) const {
    HeadPlan plan = {};
    const int64_t scratch_bytes = round_up(scratch * statistic, 16);
    plan.scratch_size = scratch_bytes / statistic;
    plan.scratch_in_shared = scratch_bytes <= shared_limit / 3;
    const auto front = [&](int64_t c, int64_t p) {
      const int64_t shares = std::max<int64_t>(1, threads / p);
      return round_up(std::max({weights * round_up(c, pack()) * statistic, shares / 2 * p * total, handed}), 16);
    };
    const auto fixed = [&](int64_t c, int64_t p) {
      return front(c, p) + (plan.scratch_in_shared ? scratch_bytes : 0);
    };
    fit(&plan, std::min(sizes.channels, kHeadRounds * threads / pack() * pack()), sizes.positions, fixed);
    const int64_t needed = (sizes.channels + plan.tile_channels - 1) / plan.tile_channels;
    plan.parts = std::max<int64_t>(1, std::min({needed, kHeadMaxParts, resident}));
    plan.range = round_up((sizes.channels + plan.parts - 1) / plan.parts, pack());
    plan.parts = std::max<int64_t>(1, (sizes.channels + plan.range - 1) / plan.range);
    plan.tile_channels = std::min(plan.tile_channels, plan.range);
    plan.groups = std::max<int64_t>(1, std::min(sizes.batch, resident / plan.parts));
    plan.scratch_offset = front(plan.tile_channels, plan.tile_positions);
    plan.tile_offset = fixed(plan.tile_channels, plan.tile_positions);
    set_pitch(&plan);
    return plan;
  }
};

// Numbers of the scratch of one block. What lies together is used together, see head_spatial.cuh.
inline int64_t forward_scratch(const HeadSizes& sizes) { return 7 * sizes.positions + 3 * sizes.hidden; }
inline int64_t backward_scratch(const HeadSizes& sizes) { return 16 * sizes.positions + 6 * sizes.hidden; }

template <typename A>
HeadPlan plan_head(const HeadPlanning& planning, const HeadSizes& sizes, bool backward, int64_t resident) {
  constexpr int64_t kForwardTotal = 4 * sizeof(A);  // ChannelSums, its index padded
  constexpr int64_t kHanded = kHeadProductNumbers * sizeof(A);
  return backward ? planning.divide(sizes, backward_scratch(sizes), 1, sizeof(A), 0, resident)
                  : planning.divide(sizes, forward_scratch(sizes), 2, kForwardTotal, kHanded, resident);
}

// What blocks and kernels hand to each other. The counters start at 0, the rest is written before it is read.
template <typename A>
struct HeadWorkspace {
  uint32_t* arrived;     // (B,) blocks that have written their sums of a sample
  uint32_t* passed;      // () barriers of the grid, forward
  A* mean;               // (B, parts, P) sums over a block's channels: of X' forward, of d_attended X' backward
  A* peak;               // (B, parts, P) forward, as are the next two
  int32_t* peak_channel;
  A* adversary;
  A* units;              // (B, units) relu(wc1 mean) + relu(wc1 peak), forward
  A* position_terms;     // (3, P, B) backward, as is the rest but `scratch`: gradients of A, B, C before their sigmoids
  A* hidden_terms;       // (6, h, B) hidden units of A, B, C, then their gradients
  A* rows;               // (B, C) the classifier's row of each label, 0 for the label -1
  A* grad_rows;            // (B, C) its gradient
  A* grad_logits;          // (B, C) gradient of A_C before the sigmoid
  A* grad_mean_map;        // (B, P) gradients of g, m and A_ad
  A* grad_peak_map;
  A* grad_adversary_map;
  A* grad_of_mean;         // (B, units) gradients of wc1 mean, wc1 peak
  A* grad_of_peak;
  A* grad_mean;            // (B, C) gradients of mean and peak, where those of rows and logits were
  A* grad_peak;
  A* scratch;            // (blocks, scratch) where shared memory is too small

  static int64_t cleared_bytes(const HeadSizes& sizes) {
    return round_up((sizes.batch + 1) * static_cast<int64_t>(sizeof(uint32_t)), 256);
  }

  // Lays it out from `base`, which may be null, and returns the bytes it takes.
  int64_t lay_out(void* base, const HeadSizes& sizes, const HeadPlan& plan, bool backward) {
    Arena arena(base);
    const int64_t sums = sizes.batch * plan.parts * sizes.positions, map = sizes.batch * sizes.positions;
    const int64_t vectors = sizes.batch * sizes.channels;
    *this = {};
    arrived = arena.take<uint32_t>(sizes.batch + 1);
    passed = arrived == nullptr ? nullptr : arrived + sizes.batch;
    mean = arena.take<A>(sums);
    if (backward) {
      position_terms = arena.take<A>(3 * map);
      hidden_terms = arena.take<A>(6 * sizes.hidden * sizes.batch);
      for (A** const array : {&rows, &grad_rows, &grad_logits}) *array = arena.take<A>(vectors);
      grad_mean = grad_rows;
      grad_peak = grad_logits;
      for (A** const array : {&grad_mean_map, &grad_peak_map, &grad_adversary_map}) *array = arena.take<A>(map);
      for (A** const array : {&grad_of_mean, &grad_of_peak}) *array = arena.take<A>(sizes.batch * sizes.units);
    } else {
      peak = arena.take<A>(sums);
      peak_channel = arena.take<int32_t>(sums);
      adversary = arena.take<A>(sums);
      units = arena.take<A>(sizes.batch * sizes.units);
    }
    if (!plan.scratch_in_shared) scratch = arena.take<A>(plan.blocks() * plan.scratch_size);
    return arena.bytes();
  }
};

// What the last kernel of the derivative reads, when the workspace holds the rest.
template <typename A>
FeaturesGradInput<A> features_grad_input(
    const HeadOutput<const A>& saved, const HeadGrad<A>& grad, const HeadWorkspace<A>& workspace) {
  return {saved.channel_attention, workspace.rows, saved.attended.spatial_attention, saved.attended.peak_channel,
          saved.pooled.peak_position, grad.attended.attended, workspace.grad_mean_map, workspace.grad_peak_map,
          workspace.grad_adversary_map, workspace.grad_mean, workspace.grad_peak};
}

}  // namespace dan_fast
