// What lies between the two kernels of the attention head's derivative that walk a map, on CUDA: the derivatives of the
// bottleneck, and gradients of weights, which are sums over the batch in the order of the samples. Two kernels,
// since the second needs all results of the first. The bits depend on neither the number of blocks nor of threads.
//
// Each lane has a column of a result to itself, for a few rows at a time.
#pragma once

#include "head_bottleneck.cuh"

namespace dan_fast {

// The warps of a grid that share tasks: for (task = first; task < count; task += step).
struct GridWarps {
  int lane, warp, warps;  // in the block
  int64_t first, step;

  __device__ GridWarps()
      : lane(static_cast<int>(threadIdx.x) % kLanes),
        warp(static_cast<int>(threadIdx.x) / kLanes),
        warps(static_cast<int>(blockDim.x) / kLanes),
        first(static_cast<int64_t>(blockIdx.x) * warps + warp),
        step(static_cast<int64_t>(gridDim.x) * warps) {}

  // From the other end, so that warps without a task before get one.
  __device__ GridWarps reversed() const {
    GridWarps grid = *this;
    grid.first = step - 1 - first;
    return grid;
  }
};

// Rows of a product that a lane has in its column.
constexpr int kColumnRows = 8;

// sums[r] += left(r, k) right(k), k in [first, last).
template <int kRows, typename A, typename Left, typename Right>
__device__ __forceinline__ void add_column(
    int64_t first, int64_t last, const Left& left, const Right& right, A (&sums)[kRows]) {
#pragma unroll 8
  for (int64_t k = first; k < last; ++k) {
    const A own = right(k);
#pragma unroll
    for (int r = 0; r < kRows; ++r) sums[r] += left(r, k) * own;
  }
}

// call(first row, rows, column of this lane, whether there is such a column) for tiles of a result of `rows` by
// `columns`, a warp each.
template <int kRows, typename Call>
__device__ void for_column_tiles(const GridWarps& grid, int64_t rows, int64_t columns, const Call& call) {
  const int64_t by_row = (rows + kRows - 1) / kRows, by_column = (columns + kLanes - 1) / kLanes;
  for (int64_t tile = grid.first; tile < by_row * by_column; tile += grid.step) {
    const int64_t row = tile / by_column * kRows, column = tile % by_column * kLanes + grid.lane;
    const bool mine = column < columns;
    call(row, static_cast<int>(smaller<int64_t>(kRows, rows - row)), mine ? column : columns - 1, mine);
  }
}

template <typename A>
class HeadWeightsBackward {
 public:
  using Input = HeadInput<void, A>;
  using InputGrad = HeadInputGrad<void, A>;

  static constexpr int kRows = 4;                           // samples at a time
  static constexpr int kShares = 8;                         // parts of a sum over the channels, each a warp's
  static constexpr int kShared = kRows * kShares * kLanes;  // numbers that write_units needs

  __device__ HeadWeightsBackward(
      const Input& in, const HeadOutput<const A>& saved, const HeadWorkspace<A>& workspace, const InputGrad& out)
      : in_(in), saved_(saved), workspace_(workspace), out_(out), batch_(in.features.batch),
        channels_(in.features.channels), positions_(in.features.positions), units_(in.units) {}

  // grad_of_mean, grad_of_peak: the gradient of the hidden units, grad_logits wc2, where they are on. A block a tile;
  // the sum over the channels in kShares parts.
  __device__ void write_units(A* shared) const {
    const int64_t by_sample = (batch_ + kRows - 1) / kRows, by_unit = (units_ + kLanes - 1) / kLanes;
    const int64_t share_size = (channels_ + kShares - 1) / kShares;
    for (int64_t tile = blockIdx.x; tile < by_sample * by_unit; tile += gridDim.x) {
      const int64_t sample = tile / by_unit * kRows, first_unit = tile % by_unit * kLanes;
      const int rows = static_cast<int>(smaller<int64_t>(kRows, batch_ - sample));
      const int64_t unit = smaller(first_unit + grid_.lane, units_ - 1);
      const A* const grad_logits = workspace_.grad_logits + sample * channels_;
      for (int share = grid_.warp; share < kShares; share += grid_.warps) {
        A sums[kRows] = {};
        add_column(
            share * share_size, smaller((share + 1) * share_size, channels_),
            [&](int r, int64_t k) { return grad_logits[smaller(r, rows - 1) * channels_ + k]; },
            [&](int64_t k) { return in_.wc2[k * units_ + unit]; }, sums);
#pragma unroll
        for (int r = 0; r < kRows; ++r) shared[(share * kRows + r) * kLanes + grid_.lane] = sums[r];
      }
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kLanes; i += static_cast<int>(blockDim.x)) {
        const int row = i / kLanes;
        const int64_t own = first_unit + i % kLanes;
        if (row >= rows || own >= units_) continue;
        A sum = A(0);
#pragma unroll
        for (int share = 0; share < kShares; ++share) sum += shared[share * kRows * kLanes + i];
        const int64_t at = (sample + row) * units_ + own;
        workspace_.grad_of_mean[at] = relu_backward(saved_.of_mean[at], sum);
        workspace_.grad_of_peak[at] = relu_backward(saved_.of_peak[at], sum);
      }
      __syncthreads();
    }
  }

  // grad_logits^T (relu(of_mean) + relu(of_peak)), (C, units).
  __device__ void write_wc2() const {
    const GridWarps grid = grid_.reversed();
    for_column_tiles<kColumnRows>(grid, channels_, units_, [&](int64_t channel, int rows, int64_t unit, bool mine) {
      A sums[kColumnRows] = {};
      const A* const grad_logits = workspace_.grad_logits + channel;
      add_column(
          0, batch_, [&](int r, int64_t b) { return grad_logits[b * channels_ + smaller(r, rows - 1)]; },
          [&](int64_t b) { return relu(saved_.of_mean[b * units_ + unit]) + relu(saved_.of_peak[b * units_ + unit]); },
          sums);
      write(sums, rows, mine, out_.wc2 + channel * units_ + unit, units_);
    });
  }

  // grad_of_mean^T mean + grad_of_peak^T peak, (units, C).
  __device__ void write_wc1() const {
    for_column_tiles<kColumnRows>(grid_, units_, channels_, [&](int64_t unit, int rows, int64_t channel, bool mine) {
      A sums[kColumnRows] = {};
      for (int kind = 0; kind < 2; ++kind) {
        const A* const grad_units = (kind == 0 ? workspace_.grad_of_mean : workspace_.grad_of_peak) + unit;
        const A* const pooled = (kind == 0 ? saved_.pooled.mean : saved_.pooled.peak) + channel;
        add_column(
            0, batch_, [&](int r, int64_t b) { return grad_units[b * units_ + smaller(r, rows - 1)]; },
            [&](int64_t b) { return pooled[b * channels_]; }, sums);
      }
      write(sums, rows, mine, out_.wc1 + unit * channels_ + channel, channels_);
    });
  }

  // grad_mean = grad_of_mean wc1 + grad_pooled, grad_peak = grad_of_peak wc1, (B, C).
  __device__ void write_pooled(const A* grad_pooled) const {
    const GridWarps grid = grid_.reversed();
    for_column_tiles<kRows>(grid, batch_, channels_, [&](int64_t sample, int rows, int64_t channel, bool mine) {
      A sums[2 * kRows] = {};
      const A* const grad_mean = workspace_.grad_of_mean + sample * units_;
      const A* const grad_peak = workspace_.grad_of_peak + sample * units_;
      add_column(
          0, units_,
          [&](int r, int64_t k) {
            const A* const grad_units = r < kRows ? grad_mean : grad_peak;
            return grad_units[smaller(r % kRows, rows - 1) * units_ + k];
          },
          [&](int64_t k) { return in_.wc1[k * channels_ + channel]; }, sums);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows || !mine) continue;
        const int64_t at = (sample + r) * channels_ + channel;
        workspace_.grad_mean[at] = grad_pooled == nullptr ? sums[r] : grad_pooled[at] + sums[r];
        workspace_.grad_peak[at] = sums[kRows + r];
      }
    });
  }

  // The rows' gradients, added up by class: a warp has some channels of a class.
  __device__ void write_cam_weight() const {
    constexpr int kColumns = kColumnRows;
    const int64_t by_channel = (channels_ + kColumns * kLanes - 1) / (kColumns * kLanes);
    for (int64_t task = grid_.first; task < in_.classes * by_channel; task += grid_.step) {
      const int64_t row = task / by_channel, channel = task % by_channel * kColumns * kLanes + grid_.lane;
      A sums[kColumns] = {};
      for (int64_t b = 0; b < batch_; ++b) {
        if (smaller(in_.labels[b], in_.classes - 1) != row) continue;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const int64_t own = smaller(channel + i * kLanes, channels_ - 1);
          sums[i] += workspace_.grad_rows[b * channels_ + own];
        }
      }
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int64_t own = channel + i * kLanes;
        if (own < channels_) out_.cam_weight[row * channels_ + own] = sums[i];
      }
    }
  }

  // What every sample adds to the gradients of ws1, ws3, ws2 and ws4: a warp a number, its lanes every 32nd sample.
  __device__ void write_spatial() const {
    const int64_t hidden = in_.spatial.hidden, size = positions_ * hidden;
    for (int64_t i = grid_.first; i < 4 * size; i += grid_.step) {
      const int matrix = static_cast<int>(i / size);
      const int64_t at = i - matrix * size;
      const bool reduces = matrix < 2;  // (h, P)
      const int64_t p = reduces ? at % positions_ : at / hidden, j = reduces ? at / positions_ : at % hidden;
      A sum = A(0);
      for (int64_t b = grid_.lane; b < batch_; b += kLanes) {
        const A g = saved_.attended.mean_map[b * positions_ + p], m = saved_.attended.peak_map[b * positions_ + p];
        if (matrix == 0) sum += hidden_terms(3, j)[b] * g + hidden_terms(4, j)[b] * m;
        if (matrix == 1) sum += hidden_terms(5, j)[b] * g;
        if (matrix == 2) {
          sum += position_terms(0, p)[b] * hidden_terms(0, j)[b] + position_terms(1, p)[b] * hidden_terms(1, j)[b];
        }
        if (matrix == 3) sum += position_terms(2, p)[b] * hidden_terms(2, j)[b];
      }
      sum = warp_sum(sum);
      A* const grads = matrix == 0 ? out_.ws1 : matrix == 1 ? out_.ws3 : matrix == 2 ? out_.ws2 : out_.ws4;
      if (grid_.lane == 0) grads[at] = sum;
    }
  }

 private:
  template <int kCount>
  __device__ static void write(const A (&sums)[kCount], int rows, bool mine, A* to, int64_t stride) {
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      if (r < rows && mine) to[r * stride] = sums[r];
    }
  }

  __device__ const A* position_terms(int kind, int64_t p) const {
    return workspace_.position_terms + (kind * positions_ + p) * batch_;
  }
  __device__ const A* hidden_terms(int kind, int64_t j) const {
    return workspace_.hidden_terms + (kind * in_.spatial.hidden + j) * batch_;
  }

  const Input& in_;
  const HeadOutput<const A>& saved_;
  const HeadWorkspace<A>& workspace_;
  const InputGrad& out_;
  const int64_t batch_, channels_, positions_, units_;
  const GridWarps grid_;
};

// After head_attend_backward_block. `shared`: HeadWeightsBackward<A>::kShared numbers.
template <typename A>
__device__ void head_weights_backward_block(
    const HeadInput<void, A>& in, const HeadOutput<const A>& saved, const HeadWorkspace<A>& workspace,
    const HeadInputGrad<void, A>& out, A* shared) {
  const HeadWeightsBackward<A> backward(in, saved, workspace, out);
  backward.write_units(shared);
  backward.write_wc2();
  backward.write_cam_weight();
  backward.write_spatial();
}

// After head_weights_backward_block. `grad_pooled` may be null.
template <typename A>
__device__ void head_pooled_backward_block(
    const HeadInput<void, A>& in, const HeadOutput<const A>& saved, const A* grad_pooled,
    const HeadWorkspace<A>& workspace, const HeadInputGrad<void, A>& out) {
  const HeadWeightsBackward<A> backward(in, saved, workspace, out);
  backward.write_wc1();
  backward.write_pooled(grad_pooled);
}

}  // namespace dan_fast
