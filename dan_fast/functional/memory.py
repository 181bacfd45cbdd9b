"""The progressive augmentation memory, Sec. III-C, fast: same names and results as `dan_fast.reference`."""

import torch
from torch import Tensor

from dan_fast.functional.memory_pending import PendingMemory
from dan_fast.functional.memory_scan import Gates, advance
from dan_fast.functional.memory_weights import cosine_softmax, false_sample_sets
from dan_fast.reference.checks import check_memory_step
from dan_fast.reference.memory import zero_of
from dan_fast.reference.types import MemoryState, MemoryStep

__all__ = ["cosine_softmax", "false_sample_sets", "memory_step", "pending_memory_step"]


def pending_memory_step(
    labeled: PendingMemory,
    unlabeled: PendingMemory,
    keys: Tensor,
    labels: Tensor,
    unlabeled_keys: Tensor,
    sample_ids: Tensor,
    alpha: Tensor | float,
    alpha_unlabeled: Tensor | float,
    beta: Tensor | float,
    decay: float = 0.99,
    decay_unlabeled: float = 0.99,
) -> tuple[Tensor, Tensor, PendingMemory, PendingMemory]:
    """`memory_step` between memories whose writes may wait; arguments and errors as there.

    Returns:
        `(loss, pseudo_labels, labeled, unlabeled)`; the memories that came in hold what they held, though
        they may have settled it.
    """
    samples = (keys, labels, unlabeled_keys, sample_ids)
    gates, decays = (alpha, alpha_unlabeled, beta), (decay, decay_unlabeled)
    check_memory_step(labeled.unsettled(), unlabeled.unsettled(), *samples, *gates, *decays)
    return _checked_step(labeled, unlabeled, samples, gates, decays)


def _checked_step(
    labeled: PendingMemory,
    unlabeled: PendingMemory,
    samples: tuple[Tensor, Tensor, Tensor, Tensor],
    gates: tuple[Tensor | float, Tensor | float, Tensor | float],
    decays: tuple[float, float],
) -> tuple[Tensor, Tensor, PendingMemory, PendingMemory]:
    keys, _, unlabeled_keys, _ = samples
    gates = Gates(*(torch.as_tensor(gate, dtype=labeled.dtype, device=keys.device) for gate in gates))
    # Mixed precision would round the scores to 8 bits, too coarse to tell slots apart.
    with torch.autocast(keys.device.type, enabled=False):
        losses, pseudo_labels, labeled, unlabeled = advance(labeled, unlabeled, *samples, gates, *decays)
        loss = zero_of(keys, unlabeled_keys, *gates).to(labeled.dtype)
        if losses is not None:
            loss = loss + losses.mean()
    return loss, pseudo_labels, labeled, unlabeled


def memory_step(
    labeled: MemoryState,
    unlabeled: MemoryState,
    keys: Tensor,
    labels: Tensor,
    unlabeled_keys: Tensor,
    sample_ids: Tensor,
    alpha: Tensor | float,
    alpha_unlabeled: Tensor | float,
    beta: Tensor | float,
    decay: float = 0.99,
    decay_unlabeled: float = 0.99,
) -> MemoryStep:
    """One mini-batch through the progressive augmentation memory, Eqs. (5)-(16).

    All labelled samples are written to M in batch order; then each unlabelled one, in batch order, gets a
    pseudo label from M, drives false samples out of M' and is written there. Pure: no argument is changed.
    Gradients of the loss reach keys, unlabeled_keys, alpha, alpha_unlabeled and beta; the incoming states are
    constants. The same as `dan_fast.reference.memory_step`, without touching the (s, d) memories between the
    first sample and the last.

    Args:
        labeled: M, s1 slots of d numbers.
        unlabeled: M', s2 slots of d numbers.
        keys: (B, d), dtype and device of the memories.
        labels: (B,) int64, not negative.
        unlabeled_keys: (B', d).
        sample_ids: (B',) int64, not negative: which image each unlabelled key comes from.
        alpha: () raw write gate of M; Eq. (8) uses its sigmoid.
        alpha_unlabeled: () raw write gate of M'.
        beta: () confidence in pseudo labels, used as it is, Eqs. (12) and (15).
        decay: kappa1 of Eq. (5), in [0, 1].
        decay_unlabeled: kappa2 of Eq. (12), in [0, 1].

    Returns:
        `MemoryStep`: L_lde as the mean over the unlabelled samples that were not skipped (0 if there is
        none), the pseudo labels (-1 where M is wholly empty: skipped), and both new states, detached. Of
        half-precision memories everything but the features is computed in float32, the loss included.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, NaN or Inf, a negative label or sample id, a decay not in [0, 1].

    Example:
        >>> empty = MemoryState.empty(slots=3, key_dim=2)
        >>> key = torch.tensor([[1.0, 0.0]])
        >>> step = memory_step(empty, empty, key, torch.tensor([7]), key, torch.tensor([0]), 0.0, 0.0, 0.1)
        >>> step.pseudo_labels, step.unlabeled.labels
        (tensor([7]), tensor([ 7, -1, -1]))
    """
    samples = (keys, labels, unlabeled_keys, sample_ids)
    gates, decays = (alpha, alpha_unlabeled, beta), (decay, decay_unlabeled)
    check_memory_step(labeled, unlabeled, *samples, *gates, *decays)
    loss, pseudo_labels, *memories = _checked_step(
        PendingMemory.of(labeled), PendingMemory.of(unlabeled), samples, gates, decays
    )
    states = []
    for memory, old in zip(memories, (labeled, unlabeled), strict=True):
        new = memory.settle()
        # A memory that nothing was written to must not share its tensors with the argument.
        same = new.features.data_ptr() == old.features.data_ptr()
        states.append(MemoryState(*(x.clone() for x in new)) if same else new)
    return MemoryStep(loss, pseudo_labels, *states)
