"""Progressive augmentation memory, Sec. III-C: the paper step by step, one sample at a time.

Every operation is out of place, so that the loss can be differentiated any number of times in the keys, the
two write gates and beta.
"""

import torch
from torch import Tensor

from dan_fast.core.checks import (
    check_cosine_softmax,
    check_false_sample_sets,
    check_keys_finite,
    check_memory_step,
    check_step_values,
)
from dan_fast.core.cosine import attention_weights, statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState, MemoryStep


def cosine_softmax(keys: Tensor, slots: Tensor, occupied: Tensor | None = None) -> Tensor:
    """Attention of keys over memory slots by cosine similarity, Eqs. (7) and (11).

    `weight(b, i) = exp(cos(k_b, m_i)) / sum over occupied i of exp(cos(k_b, m_i))` with
    `cos(k, m) = <k, m> / (max(|k|, 1e-12) max(|m|, 1e-12))`. Cosines are rounded to a fine grid so that equal
    ones give equal weights.

    Args:
        keys: (B, d) floating.
        slots: (s, d), dtype and device of `keys`.
        occupied: (s,) bool; empty slots get weight 0. None: every slot is occupied.

    Returns:
        (B, s), float32 for half-precision keys, else the dtype of `keys`. A row is 0 if no slot is occupied.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or a key is not finite.

    Example:
        >>> cosine_softmax(torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """
    check_cosine_softmax(keys, slots, occupied)
    check_keys_finite(keys)
    return attention_weights(keys, slots, occupied)


def false_sample_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo samples that look wrong beside a new one, FP and FN of Eq. (14).

    With n the number of slots labelled y' and T the n slots of largest evaluation (lowest index first among
    equals), `FP = {label = y', not in T}` and `FN = {occupied, label != y', in T}`. They are equally many.

    Args:
        evaluation: (B, s) floating, V: the weight of every slot for every sample.
        labels: (s,) int64, pseudo labels in the memory; -1 is an empty slot, which belongs to no set.
        pseudo_labels: (B,) int64, y' of every sample; -1 has empty sets.

    Returns:
        `(false_positive, false_negative)`, both (B, s) bool, every row against the same labels.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.

    Example:
        >>> evaluation, labels = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1, 0, 1])
        >>> false_sample_sets(evaluation, labels, pseudo_labels=torch.tensor([1]))
        (tensor([[False, False,  True]]), tensor([[False,  True, False]]))
    """
    check_false_sample_sets(evaluation, labels, pseudo_labels)
    occupied = labels >= 0
    slots = occupied.nonzero()[:, 0]
    false_positive = torch.zeros(evaluation.shape, dtype=torch.bool, device=evaluation.device)
    false_negative = torch.zeros_like(false_positive)
    for row, pseudo_label in enumerate(pseudo_labels):
        same = occupied & (labels == pseudo_label)
        ranking = evaluation[row, slots].detach().sort(descending=True, stable=True).indices
        largest = slots[ranking[: int(same.sum())]]
        in_largest = torch.zeros_like(occupied)
        in_largest[largest] = True
        false_positive[row] = same & ~in_largest
        false_negative[row] = occupied & ~same & in_largest
    return false_positive, false_negative


def zero_of(*inputs: Tensor) -> Tensor:
    """A () zero that depends on every input: gradients exist, and are 0, whatever the batch contains."""
    return sum((value.reshape(-1)[:0].sum() for value in inputs), start=inputs[0].new_zeros(()))


def _write(
    memory: MemoryState,
    key: Tensor,
    label: Tensor,
    sample_id: Tensor,
    gate: Tensor,
    decay: float,
    trust: Tensor,
) -> MemoryState:
    """Write one sample; `gate` is sigma(alpha), `trust` scales W^e in the usage: 1 for M, beta for M'."""
    is_least_used = torch.arange(memory.labels.numel(), device=key.device) == memory.least_used
    least_used = is_least_used.to(key.dtype)  # W^lu, Eq. (6)
    # W^e is as old as the last write. A slot emptied since then (a false sample) takes no share, unless as
    # the least-used slot; the least-used slot itself still counts as occupied here, being cleared only below.
    last_evaluation = torch.where(memory.occupied, memory.evaluation, 0.0)
    write = gate * last_evaluation + (1 - gate) * least_used  # Eq. (8)
    features = memory.features * (1 - least_used)[:, None]  # Eq. (9)
    features = features + write[:, None] * key  # Eq. (10)
    labels = torch.where(is_least_used, label, memory.labels)
    sample_ids = torch.where(is_least_used, sample_id, memory.sample_ids)
    evaluation = attention_weights(key[None], features, labels >= 0)[0]  # Eq. (7), after the write
    usage = decay * memory.usage + (trust * evaluation + write).detach()  # Eqs. (5) and (12)
    return MemoryState(features, labels, usage, evaluation, usage.argmin(), sample_ids)


def _retrieve(memory: MemoryState, key: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo label of a key, Eq. (11), and its loss -log(P / (P + N)), Eqs. (13) and (16)."""
    retrieval = attention_weights(key[None], memory.features, memory.occupied)[0]  # W^r
    pseudo_label = memory.labels[retrieval.argmax()]
    positive = memory.occupied & (memory.labels == pseudo_label)
    negative = memory.occupied & (memory.labels != pseudo_label)
    mean_positive = retrieval[positive].mean()
    mean_negative = retrieval[negative].mean() if negative.any() else retrieval.new_zeros(())
    return pseudo_label, -torch.log(mean_positive / (mean_positive + mean_negative))


def _drop_false_samples(memory: MemoryState, key: Tensor, pseudo_label: Tensor) -> tuple[MemoryState, Tensor]:
    """Clear FP and FN of Eq. (14); also their loss -log(FP / (FP + FN)), 0 if there are none."""
    evaluation = attention_weights(key[None], memory.features, memory.occupied)  # V, before the write
    sets = false_sample_sets(evaluation, memory.labels, pseudo_label[None])
    false_positive, false_negative = sets[0][0], sets[1][0]
    loss = evaluation.new_zeros(())
    if false_positive.any():
        mean_positive = evaluation[0, false_positive].mean()
        mean_negative = evaluation[0, false_negative].mean()
        loss = -torch.log(mean_positive / (mean_positive + mean_negative))
    false = false_positive | false_negative
    usage = memory.usage.masked_fill(false, 0.0)
    memory = memory._replace(
        features=memory.features.masked_fill(false[:, None], 0.0),
        labels=memory.labels.masked_fill(false, -1),
        sample_ids=memory.sample_ids.masked_fill(false, -1),
        usage=usage,
        least_used=usage.argmin(),
    )
    return memory, loss


def _working_copy(state: MemoryState) -> MemoryState:
    """The incoming state as a constant, in the dtype of statistics."""
    dtype = statistics_dtype(state.features.dtype)
    return MemoryState(*(x.detach().to(dtype) if x.is_floating_point() else x.detach() for x in state))


def _outgoing(state: MemoryState, like: MemoryState) -> MemoryState:
    copied = MemoryState(*(x.detach().clone() for x in state))
    return copied._replace(features=copied.features.to(like.features.dtype))


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

    All labelled samples are written to M in batch order; then each unlabelled one, in batch order, gets a pseudo label
    from M, drives false samples out of M' and is written there. The function is pure: it changes no argument. Gradients
    of the loss reach keys, unlabeled_keys, alpha, alpha_unlabeled and beta; the incoming states are constants.

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
        `MemoryStep`: L_lde as the mean over the unlabelled samples that were not skipped (0 if there is none), the
        pseudo labels (-1 where M is wholly empty: skipped), and both new states, detached. For half-precision memories,
        everything but the features is computed in float32, including the loss.

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
    batch = MemoryBatch(keys, labels, unlabeled_keys, sample_ids)
    gates = Gates(alpha, alpha_unlabeled, beta, decay, decay_unlabeled)
    check_memory_step(labeled, unlabeled, batch, gates)
    check_step_values(labeled, unlabeled, batch, gates)
    dtype = statistics_dtype(keys.dtype)
    keys, unlabeled_keys = keys.to(dtype), unlabeled_keys.to(dtype)
    alpha, alpha_unlabeled, beta = (
        torch.as_tensor(gate, dtype=dtype, device=keys.device) for gate in (alpha, alpha_unlabeled, beta)
    )
    memory, pseudo_memory = _working_copy(labeled), _working_copy(unlabeled)
    no_sample = sample_ids.new_full((), -1)

    for key, label in zip(keys, labels, strict=True):
        one = torch.ones_like(beta)
        memory = _write(memory, key, label, no_sample, torch.sigmoid(alpha), decay, trust=one)

    losses, pseudo_labels = [], []
    for key, sample_id in zip(unlabeled_keys, sample_ids, strict=True):
        if not memory.occupied.any():
            pseudo_labels.append(no_sample)
            continue
        pseudo_label, labeled_loss = _retrieve(memory, key)
        pseudo_memory, unlabeled_loss = _drop_false_samples(pseudo_memory, key, pseudo_label)
        gate = torch.sigmoid(alpha_unlabeled)
        pseudo_memory = _write(pseudo_memory, key, pseudo_label, sample_id, gate, decay_unlabeled, trust=beta)
        losses.append(labeled_loss + beta * unlabeled_loss)  # Eqs. (15) and (16)
        pseudo_labels.append(pseudo_label)

    loss = zero_of(keys, unlabeled_keys, alpha, alpha_unlabeled, beta)
    if losses:
        loss = loss + torch.stack(losses).mean()
    return MemoryStep(
        loss=loss,
        pseudo_labels=torch.stack(pseudo_labels) if pseudo_labels else sample_ids.new_empty(0),
        labeled=_outgoing(memory, labeled),
        unlabeled=_outgoing(pseudo_memory, unlabeled),
    )
