"""The tuples that go in and out of the operators, the same for `reference` and `functional`.

They are named tuples so that autograd, `torch.compile` and `torch.utils._pytree` see through them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.core.cosine import FLOATING, statistics_dtype


class MemoryState(NamedTuple):
    """One external memory, M or M' of Sec. III-C.

    A label or sample id of -1 marks an empty slot.

    Attributes:
        features: (s, d) floating, the stored keys; the rows of empty slots are zero.
        labels: (s,) int64, label or pseudo label.
        usage: (s,) floating, W^u of Eq. (5); float32 beside features in half precision, as `evaluation`.
        evaluation: (s,) floating, W^e of the last write, Eq. (7).
        least_used: () int64, the slot the next write clears and fills, Eq. (6).
        sample_ids: (s,) int64, which image filled the slot; -1 in a labelled memory.

    Example:
        >>> MemoryState.empty(slots=4, key_dim=3).labels
        tensor([-1, -1, -1, -1])
    """

    features: Tensor
    labels: Tensor
    usage: Tensor
    evaluation: Tensor
    least_used: Tensor
    sample_ids: Tensor

    @classmethod
    def empty(
        cls,
        slots: int,
        key_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "MemoryState":
        """A memory of `slots` empty slots for keys of `key_dim` numbers.

        Raises:
            ValueError: `slots` or `key_dim` is not positive.
            TypeError: `dtype` is not a floating type.
        """
        if slots < 1 or key_dim < 1:
            raise ValueError(f"slots and key_dim must be positive, got slots={slots} and key_dim={key_dim}")
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be a floating type, float64, float32, float16 or bfloat16, got {dtype}")
        nothing = torch.full((slots,), -1, dtype=torch.int64, device=device)
        return cls(
            features=torch.zeros(slots, key_dim, dtype=dtype, device=device),
            labels=nothing,
            usage=torch.zeros(slots, dtype=statistics_dtype(dtype), device=device),
            evaluation=torch.zeros(slots, dtype=statistics_dtype(dtype), device=device),
            least_used=torch.zeros((), dtype=torch.int64, device=device),
            sample_ids=nothing.clone(),
        )

    @property
    def occupied(self) -> Tensor:
        """(s,) bool, the slots that hold a sample."""
        return self.labels >= 0


def with_statistics(state: MemoryState) -> MemoryState:
    """`state` with usage and evaluation in the dtype that they are computed in; half precision would round them."""
    dtype = statistics_dtype(state.features.dtype)
    return state._replace(usage=state.usage.to(dtype), evaluation=state.evaluation.to(dtype))


class MemoryBatch(NamedTuple):
    """One mini-batch for both memories, in the order in which `memory_step` takes it.

    Attributes:
        keys: (B, d) floating, of the labelled samples.
        labels: (B,) int64, not negative.
        unlabeled_keys: (B', d), dtype and device of `keys`.
        sample_ids: (B',) int64, not negative: which image each unlabelled key comes from.
    """

    keys: Tensor
    labels: Tensor
    unlabeled_keys: Tensor
    sample_ids: Tensor


class Gates(NamedTuple):
    """How strongly a memory step writes and forgets: the arguments of `memory_step` that follow the batch.

    Attributes:
        alpha: () raw write gate of M, Eq. (8).
        alpha_unlabeled: () raw write gate of M'.
        beta: () confidence in pseudo labels, as it is used, Eqs. (12) and (15).
        decay: kappa1 of Eq. (5), in [0, 1].
        decay_unlabeled: kappa2 of Eq. (12), in [0, 1].
    """

    alpha: Tensor | float
    alpha_unlabeled: Tensor | float
    beta: Tensor | float
    decay: float = 0.99
    decay_unlabeled: float = 0.99


class MemoryStep(NamedTuple):
    """What one mini-batch did to both memories.

    Attributes:
        loss: () floating, L_lde of Eq. (15), the mean over the unlabelled samples that were not skipped.
        pseudo_labels: (B',) int64, y' of Eq. (11); -1 for a sample that was skipped.
        labeled: the new M, detached.
        unlabeled: the new M', detached.
    """

    loss: Tensor
    pseudo_labels: Tensor
    labeled: MemoryState
    unlabeled: MemoryState


class NLCBAMWeights(NamedTuple):
    """The fully connected weights of NL-CBAM, Eqs. (2)-(3), for C channels and HW positions; no biases.

    Attributes:
        wc1: (max(1, C // r), C), wc2: (C, max(1, C // r)): the bottleneck of channel attention.
        ws1, ws3: (max(1, HW // r), HW), ws2, ws4: (HW, max(1, HW // r)): the bottlenecks of spatial attention;
            ws1 and ws2 serve A and B, ws3 and ws4 serve C.
    """

    wc1: Tensor
    wc2: Tensor
    ws1: Tensor
    ws3: Tensor
    ws2: Tensor
    ws4: Tensor


# CBAM's convolution: from the mean and the maximum over channels to one map, 7 x 7.
CONVOLUTION = (1, 2, 7, 7)


def attention_shapes(channels: int, positions: int, hidden_c: int, hidden_s: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an attention's weights by name, for bottlenecks of `hidden_c` and `hidden_s` units."""
    return {
        "wc1": (hidden_c, channels),
        "wc2": (channels, hidden_c),
        "ws1": (hidden_s, positions),
        "ws3": (hidden_s, positions),
        "ws2": (positions, hidden_s),
        "ws4": (positions, hidden_s),
        "conv": CONVOLUTION,
    }


class AttentionVariantWeights(NamedTuple):
    """The weights of an attention that Fig. 6 compares NL-CBAM with; a part whose weights are None is left out.

    Channel attention is that of Eq. (2); spatial attention is either that of Eq. (3) or CBAM's.

    Attributes:
        wc1, wc2: the bottleneck of channel attention, as in `NLCBAMWeights`.
        ws1, ws3, ws2, ws4: the bottlenecks of non-local spatial attention, as in `NLCBAMWeights`.
        conv: (1, 2, 7, 7), the convolution of CBAM's spatial attention; no bias.
    """

    wc1: Tensor | None = None
    wc2: Tensor | None = None
    ws1: Tensor | None = None
    ws3: Tensor | None = None
    ws2: Tensor | None = None
    ws4: Tensor | None = None
    conv: Tensor | None = None


class NLCBAMOutput(NamedTuple):
    """What NL-CBAM makes of a map.

    Attributes:
        refined: (B, C, H, W), X'' of Sec. III-B.
        channel_attention: (B, C), A_C of Eq. (2).
        spatial_attention: (B, HW), A_S of Eq. (3).
    """

    refined: Tensor
    channel_attention: Tensor
    spatial_attention: Tensor


class AdversaryOutput(NamedTuple):
    """The attention adversary's loss and the two maps that it compares.

    Attributes:
        loss: (B,), L_aad of Eq. (4); 0 where the label is -1.
        refined_map: (B, HW), A_at.
        adversary_map: (B, HW), A_ad, the class activation map; 0 where the label is -1.
    """

    loss: Tensor
    refined_map: Tensor
    adversary_map: Tensor


class AttentionHeadOutput(NamedTuple):
    """What the training loss needs from the last map.

    Attributes:
        attended: (B, C), the spatial mean of X''.
        pooled: (B, C), the spatial mean of X.
        channel_attention: (B, C), A_C.
        spatial_attention: (B, HW), A_S.
        adversary_loss: (B,), L_aad; 0 where the label is -1.
    """

    attended: Tensor
    pooled: Tensor
    channel_attention: Tensor
    spatial_attention: Tensor
    adversary_loss: Tensor
