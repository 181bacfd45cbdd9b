// head_attend_backward on CUDA: one read of X, divided among blocks as the forward pass is.
#pragma once

#include "head_cuda_attend.cuh"

namespace dan_fast {

template <typename A>
struct SpatialSum {
  A value;
  static __device__ SpatialSum none() { return {A(0)}; }
  __device__ void add(const SpatialSum& other) { value += other.value; }
};

// A warp a number: what every sample adds to the gradients of ws1, ws3, ws2 and ws4, the lanes taking every 32nd.
template <typename A>
__device__ void write_weight_grads(
    const HeadSizes& sizes, const Saved<A>& saved, const HeadWorkspace<A>& workspace, const AttendInputGrad<A>& out) {
  const int64_t batch = sizes.batch, positions = sizes.positions, hidden = sizes.hidden, size = positions * hidden;
  const auto position_terms = [&](int kind, int64_t p) {
    return workspace.position_terms + (kind * positions + p) * batch;
  };
  const auto hidden_terms = [&](int kind, int64_t j) { return workspace.hidden_terms + (kind * hidden + j) * batch; };
  const int lane = threadIdx.x % kLanes;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kLanes);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes; i < 4 * size;
       i += warps) {
    const int matrix = static_cast<int>(i / size);
    const int64_t at = i - matrix * size;
    const bool reduces = matrix < 2;  // (h, P)
    const int64_t p = reduces ? at % positions : at / hidden, j = reduces ? at / positions : at % hidden;
    A sum = A(0);
    for (int64_t b = lane; b < batch; b += kLanes) {
      const A g = saved.mean_map[b * positions + p], m = saved.peak_map[b * positions + p];
      if (matrix == 0) sum += hidden_terms(3, j)[b] * g + hidden_terms(4, j)[b] * m;
      if (matrix == 1) sum += hidden_terms(5, j)[b] * g;
      if (matrix == 2) {
        sum += position_terms(0, p)[b] * hidden_terms(0, j)[b] + position_terms(1, p)[b] * hidden_terms(1, j)[b];
      }
      if (matrix == 3) sum += position_terms(2, p)[b] * hidden_terms(2, j)[b];
    }
    sum = warp_sum(sum);
    A* const grads = matrix == 0 ? out.ws1 : matrix == 1 ? out.ws3 : matrix == 2 ? out.ws2 : out.ws4;
    if (lane == 0) grads[at] = sum;
  }
}

// `shared`: plan.shared_bytes, aligned to 16 bytes. All plan.blocks() blocks run at once.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_attend_backward_block(
    const FeatureMap<const S>& map, const AttendInput<A>& in, const Saved<A>& saved, const AttendedGrad<A>& grad,
    const AttendInputGrad<A>& out, const HeadPlan& plan, const HeadWorkspace<A>& workspace, unsigned char* shared) {
  HeadBlock<S, A, kChannelsLast> block(map, plan, shared);
  const int64_t channels = map.channels, positions = map.positions, hidden = in.weights.hidden;
  const HeadSizes sizes{map.batch, channels, positions, hidden};
  const SpatialScratch<A, true> scratch{
      block.scratch(workspace), static_cast<int>(positions), static_cast<int>(in.weights.hidden)};
  const SpatialBlock<A, true> spatial(in.weights, scratch);
  const A per_position = A(1) / static_cast<A>(positions), per_channel = A(1) / static_cast<A>(channels);

  for (int64_t sample = block.first_sample(); sample < map.batch; sample += plan.groups) {
    const A* const channel_attention = in.channel_attention + sample * channels;
    const A* const attended_grad = grad.attended + sample * channels;
    const int32_t* const peak_channel = saved.peak_channel + sample * positions;
    const int64_t sums_at = sample * plan.parts * positions, own_at = sums_at + block.part() * positions;
    block.template sum_channels<1, SpatialSum<A>>(
        sample, [&](int64_t channel, int) { return attended_grad[channel] * channel_attention[channel]; },
        [](int64_t, A x, const A(&weights)[1], SpatialSum<A>* sum) { sum->value += x * weights[0]; },
        [&](int64_t position, const SpatialSum<A>& sum) { workspace.mean[own_at + position] = sum.value; });
    arrive(workspace.arrived + sample);
    wait_for(workspace.arrived + sample, static_cast<uint32_t>(plan.parts));

    const bool writes = block.part() == 0, known = in.labels[sample] >= 0;
    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      A sum = A(0);
      for (int64_t part = 0; part < plan.parts; ++part) sum += workspace.mean[sums_at + part * positions + p];
      const int64_t at = sample * positions + p;
      const A g = saved.mean_map[at], attention = saved.spatial_attention[at];
      AdversaryGrad<A> by = {A(0), A(0)};
      if (known) by = adversary_term_backward(g * attention, saved.adversary_map[at], grad.loss[sample]);
      scratch.g()[p] = g;
      scratch.m()[p] = saved.peak_map[at];
      scratch.spatial()[p] = attention;
      scratch.spatial_grad()[p] = sum * per_position + grad.spatial_attention[at] + g * by.refined;
      scratch.adversary()[p] = by.adversary;
      scratch.position_grads()[p].values[1] = attention * by.refined;
    }
    __syncthreads();
    spatial.find_gates();
    spatial.find_gradients();
    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      PositionGrad<A>& own = scratch.position_grads()[p];
      const int64_t at = sample * positions + p;
      const A by_mean = own.values[1] + spatial.mean_grad(static_cast<int>(p));
      const A by_peak = spatial.peak_grad(static_cast<int>(p)), by_adversary = scratch.adversary()[p];
      own = {{scratch.spatial()[p], by_mean * per_channel, by_adversary, by_peak}};
      if (!writes) continue;
      out.mean_map[at] = by_mean;
      out.peak_map[at] = by_peak;
      out.adversary_map[at] = by_adversary;
    }
    if (writes) {
      for (int64_t i = block.thread(); i < 3 * positions; i += block.threads()) {
        workspace.position_terms[i * map.batch + sample] = scratch.a_grad()[i];
      }
      for (int64_t i = block.thread(); i < 3 * hidden; i += block.threads()) {
        workspace.hidden_terms[i * map.batch + sample] = scratch.hidden()[i];
        workspace.hidden_terms[(3 * hidden + i) * map.batch + sample] = scratch.hidden_grad()[i];
      }
      arrive(workspace.finished);
    }
    __syncthreads();
    block.template sum_positions<3>(
        sample,
        [&](A(&sums)[3], int64_t channel, int64_t position, A x) {
          const PositionGrad<A> by = scratch.position_grads()[position];
          sums[0] += x * by.values[0];
          sums[1] += x * by.values[1];
          sums[2] += x * by.values[2];
          if (peak_channel[position] == channel) sums[1] += x * by.values[3];
        },
        [&](int64_t channel, const A(&sums)[3]) {
          const int64_t at = sample * channels + channel;
          out.channel_attention[at] = attended_grad[channel] * (sums[0] * per_position) + sums[1];
          out.rows[at] = known ? sums[2] : A(0);  // whatever X holds
        });
  }
  wait_for(workspace.finished, static_cast<uint32_t>(map.batch));
  write_weight_grads(sizes, saved, workspace, out);
}

}  // namespace dan_fast
