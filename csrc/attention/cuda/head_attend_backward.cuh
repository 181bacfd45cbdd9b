// The pass over X of the attention head's derivative on CUDA: one read, divided among blocks as the forward pass is. It
// leaves the gradients of A_C's logits, of the label rows and of the maps in the workspace, and what every sample adds
// to the gradients of the spatial weights.
#pragma once

#include "head_block.cuh"
#include "head_bottleneck.cuh"
#include "head_spatial.cuh"

namespace dan_fast {

template <typename A>
struct SpatialSum {
  A value;
  static __device__ SpatialSum none() { return {A(0)}; }
  __device__ void add(const SpatialSum& other) { value += other.value; }
};

// `shared`: plan.shared_bytes, aligned to 16 bytes. All plan.blocks() blocks run at once.
template <typename S, typename A, bool kChannelsLast>
__device__ void head_attend_backward_block(
    const HeadInput<S, A>& in, const HeadOutput<const A>& saved_head, const HeadGrad<A>& grad_head,
    const HeadPlan& plan, const HeadWorkspace<A>& workspace, unsigned char* shared) {
  const FeatureMap<const S>& map = in.features;
  const Attended<const A>& saved = saved_head.attended;
  const AttendedGrad<A>& grad = grad_head.attended;
  HeadBlock<S, A, kChannelsLast> block(map, plan, shared);
  const int64_t channels = map.channels, positions = map.positions, hidden = in.spatial.hidden;
  const SpatialScratch<A, true> scratch{
      block.scratch(workspace), static_cast<int>(positions), static_cast<int>(hidden)};
  const SpatialBlock<A, true> spatial(in.spatial, scratch);
  const A per_position = A(1) / static_cast<A>(positions), per_channel = A(1) / static_cast<A>(channels);

  for (int64_t sample = block.group(plan); sample < map.batch; sample += plan.groups) {
    const A* const channel_attention = saved_head.channel_attention + sample * channels;
    const A* const grad_attended = grad.attended + sample * channels;
    const A* const label_row = row_of_label(in, sample);
    const int32_t* const peak_channel = saved.peak_channel + sample * positions;
    const int64_t sums_at = sample * plan.parts * positions, own_at = sums_at + block.part() * positions;
    block.template sum_channels<1, SpatialSum<A>>(
        sample, true, [&](int64_t channel, int) { return grad_attended[channel] * channel_attention[channel]; },
        [](int64_t, A x, const A(&weights)[1], SpatialSum<A>* sum) { sum->value += x * weights[0]; },
        [&](int64_t position, const SpatialSum<A>& sum) { workspace.mean[own_at + position] = sum.value; });
    arrive(workspace.arrived + sample);
    wait_for(workspace.arrived + sample, static_cast<uint32_t>(plan.parts));

    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      A sum = A(0);
      for (int64_t part = 0; part < plan.parts; ++part) sum += workspace.mean[sums_at + part * positions + p];
      const int64_t at = sample * positions + p;
      const A g = saved.mean_map[at], attention = saved.spatial_attention[at];
      AdversaryGrad<A> term = {A(0), A(0)};
      if (label_row != nullptr) {
        term = adversary_term_backward(g * attention, saved.adversary_map[at], grad.loss[sample]);
      }
      scratch.g()[p] = g;
      scratch.m()[p] = saved.peak_map[at];
      scratch.spatial()[p] = attention;
      scratch.grad_spatial()[p] = sum * per_position + grad.spatial_attention[at] + g * term.refined;
      scratch.adversary()[p] = term.adversary;
      scratch.grad_positions()[p].values[1] = attention * term.refined;
    }
    __syncthreads();
    spatial.find_gates();
    spatial.find_gradients();
    const bool writes = block.part() == 0;
    for (int64_t p = block.thread(); p < positions; p += block.threads()) {
      PositionGrad<A>& own = scratch.grad_positions()[p];
      const int64_t at = sample * positions + p;
      const A grad_mean = own.values[1] + spatial.grad_mean(static_cast<int>(p));
      const A grad_peak = spatial.grad_peak(static_cast<int>(p)), grad_adversary = scratch.adversary()[p];
      own = {{scratch.spatial()[p], grad_mean * per_channel, grad_adversary, grad_peak}};
      if (!writes) continue;
      workspace.grad_mean_map[at] = grad_mean;
      workspace.grad_peak_map[at] = grad_peak;
      workspace.grad_adversary_map[at] = grad_adversary;
    }
    if (writes) {
      for (int64_t i = block.thread(); i < 3 * positions; i += block.threads()) {
        workspace.position_terms[i * map.batch + sample] = scratch.grad_a()[i];
      }
      for (int64_t i = block.thread(); i < 3 * hidden; i += block.threads()) {
        workspace.hidden_terms[i * map.batch + sample] = scratch.hidden()[i];
        workspace.hidden_terms[(3 * hidden + i) * map.batch + sample] = scratch.grad_hidden()[i];
      }
    }
    __syncthreads();
    block.template sum_positions<Totals<A, 3>>(
        sample, false,
        [&](Totals<A, 3>* sums, int64_t channel, int64_t position, A x) {
          const PositionGrad<A> factors = scratch.grad_positions()[position];
          sums->values[0] += x * factors.values[0];
          sums->values[1] += x * factors.values[1];
          sums->values[2] += x * factors.values[2];
          if (peak_channel[position] == channel) sums->values[1] += x * factors.values[3];
        },
        [&](int64_t channel, const Totals<A, 3>& sums) {
          const int64_t at = sample * channels + channel;
          A grad_gate = grad_attended[channel] * (sums.values[0] * per_position) + sums.values[1];
          if (grad_head.channel_attention != nullptr) grad_gate += grad_head.channel_attention[at];
          workspace.grad_logits[at] = grad_gate * sigmoid_backward(channel_attention[channel]);
          // Without a label they are 0 whatever X holds.
          workspace.rows[at] = label_row == nullptr ? A(0) : label_row[channel];
          workspace.grad_rows[at] = label_row == nullptr ? A(0) : sums.values[2];
        });
  }
}

}  // namespace dan_fast
