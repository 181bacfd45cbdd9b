"""The progressive augmentation memory, Sec. III-C, fast: same names and results as `dan_fast.reference`."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor

from dan_fast.core.checks import check_memory_step, in_vmap, may_look_at
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState, MemoryStep, with_statistics
from dan_fast.functional.autocast import full_precision, keys_in_memory_dtype
from dan_fast.functional.derivatives import in_backward_pass, in_transform
from dan_fast.functional.memory.passes import memory_commit, memory_scores
from dan_fast.functional.memory.pending import PendingMemory, lasting_tensors, require_no_capture
from dan_fast.functional.memory.scan import scan
from dan_fast.functional.memory.scan_types import ScanInput, ScanResult, Slots, WrittenSlots, sentence_of
from dan_fast.functional.memory.sharded import GatesOf, ShardedMemory, exchange, read_shards
from dan_fast.functional.products import product

# Keys (T, d), and the last B' of them -> scores (T, s1), |m_i|^2 (s1,) of M; scores (B', s2), |m_i|^2 (s2,) of M'.
Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


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
    of the loss reach keys, unlabeled_keys, alpha, alpha_unlabeled and beta; the incoming states are constants. It gives
    the same as `dan_fast.reference.memory_step`, without touching the (s, d) memories between the first sample and the
    last.

    Args:
        labeled: M, s1 slots of d numbers. They must be finite, as must those of M'; this is not checked.
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
        everything but the features is computed in float32, including the loss. On a GPU and in a compiled function,
        where checking the values of tensors would wait for the device or break the graph, bad values give the loss NaN,
        pseudo labels -1 and both states as they came in.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a number that is not finite, a decay not in [0, 1], or, in a tensor on
            the CPU, NaN or Inf, a negative label or sample id.
        NotImplementedError: it is called under `torch.vmap`.

    Example:
        >>> empty = MemoryState.empty(slots=3, key_dim=2)
        >>> key = torch.tensor([[1.0, 0.0]])
        >>> step = memory_step(empty, empty, key, torch.tensor([7]), key, torch.tensor([0]), 0.0, 0.0, 0.1)
        >>> step.pseudo_labels, step.unlabeled.labels
        (tensor([7]), tensor([ 7, -1, -1]))
    """
    if in_vmap():
        raise NotImplementedError(
            "a memory is written slot by slot, which torch.vmap cannot: call memory_step in a loop"
        )
    batch = _in_memory_dtype(labeled, MemoryBatch(keys, labels, unlabeled_keys, sample_ids))
    gates = Gates(alpha, alpha_unlabeled, beta, decay, decay_unlabeled)
    check_memory_step(labeled, unlabeled, batch, gates)
    base, unlabeled_base = labeled.features.detach(), unlabeled.features.detach()

    def read(keys: Tensor, unlabeled_keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *memory_scores(keys, base), *memory_scores(unlabeled_keys, unlabeled_base)

    result = _scan_batch(batch, gates, labeled, unlabeled, read)
    with full_precision(base.device):
        new_labeled = _new_state(labeled, batch.keys, result.labeled, result.fault)
        new_unlabeled = _new_state(unlabeled, batch.unlabeled_keys, result.unlabeled, result.fault)
    return MemoryStep(result.loss, result.pseudo_labels, new_labeled, new_unlabeled)


@torch.compiler.disable(reason="a memory that advances is not compiled: dan_fast.functional.memory_step is")
def pending_memory_step(
    labeled: PendingMemory, unlabeled: PendingMemory, batch: MemoryBatch, gates: Gates
) -> tuple[ScanResult, PendingMemory, PendingMemory]:
    """`memory_step` between memories whose writes may wait; errors as there.

    Raises:
        NotImplementedError: forward mode or a transform of `torch.func`: the memories advance, so a pass that is
            repeated would start from others, and would keep tensors that are nothing outside of the transform.
        RuntimeError: inside of a backward pass, for the same reason.
        RuntimeError: a CUDA graph is being captured. Which tensors wait is decided here, at every step anew; a
            replay would start from the same memory each time. Or fake tensors are made, as `torch.export` does.

    Returns:
        `(result, labeled, unlabeled)`; the memories that came in hold what they held, though they may have
        settled it.
    """
    _require_one_pass(labeled.base)
    with lasting_tensors():
        batch = _in_memory_dtype(labeled.unsettled(), batch)
        check_memory_step(labeled.unsettled(), unlabeled.unsettled(), batch, gates)
        return _advanced(
            labeled, unlabeled, batch, gates, lambda keys, others: (*labeled.read(keys), *unlabeled.read(others))
        )


@torch.compiler.disable(reason="a memory that advances is not compiled: dan_fast.functional.memory_step is")
def sharded_memory_step(
    labeled: ShardedMemory,
    unlabeled: ShardedMemory,
    batch: MemoryBatch,
    gate_features: Tensor | None,
    gates_of: GatesOf,
) -> tuple[ScanResult, ShardedMemory, ShardedMemory]:
    """`pending_memory_step` of the rows of all ranks, each of which hands in its own; collective.

    Args:
        labeled, unlabeled: divided over the same ranks.
        batch: this rank's rows, B and B' of its own.
        gate_features: (N, 3), this rank's, or None on all ranks.
        gates_of: the gates, from the gate features of all ranks or from None.

    Returns:
        As `pending_memory_step`; the loss is that of the whole batch, the pseudo labels are those of `batch`.
    """
    _require_one_pass(labeled.base)
    with lasting_tensors():
        batch = _in_memory_dtype(labeled.unsettled(), batch)
        given = exchange(labeled, unlabeled, batch, gate_features, gates_of)
        read = partial(read_shards, labeled, unlabeled, given.waits)
        result, *memories = _advanced(labeled, unlabeled, given.batch, given.gates, read)
        return result._replace(pseudo_labels=result.pseudo_labels[given.own_unlabeled]), *memories


def _advanced(
    labeled: PendingMemory, unlabeled: PendingMemory, batch: MemoryBatch, gates: Gates, read: Read
) -> tuple[ScanResult, PendingMemory, PendingMemory]:
    result = _scan_batch(batch, gates, labeled.unsettled(), unlabeled.unsettled(), read)
    return (
        result,
        _after(labeled, batch.keys, result.labeled, result.fault),
        _after(unlabeled, batch.unlabeled_keys, result.unlabeled, result.fault),
    )


def _require_one_pass(features: Tensor) -> None:
    if in_backward_pass():
        raise RuntimeError(
            "a memory takes no step inside of a backward pass, where activation checkpointing would compute one again "
            "from memories that have advanced: checkpoint only what makes the keys, and call the memory outside of it"
        )
    if in_transform():
        raise NotImplementedError(
            "a memory that advances has no forward mode and no place in a transform of torch.func: take "
            "functional.memory_step, which leaves its memories alone"
        )
    if detect_fake_mode() is not None and not isinstance(features, FakeTensor):
        raise RuntimeError(
            "a memory that advances cannot be exported or traced with fake tensors, which would become its content: "
            "take functional.memory_step, which leaves its memories alone"
        )
    require_no_capture(features)


def _in_memory_dtype(labeled: MemoryState, batch: MemoryBatch) -> MemoryBatch:
    dtype = getattr(getattr(labeled, "features", None), "dtype", None)  # whatever it is will be checked
    if dtype is None:
        return batch
    return batch._replace(
        keys=keys_in_memory_dtype(batch.keys, dtype), unlabeled_keys=keys_in_memory_dtype(batch.unlabeled_keys, dtype)
    )


def _scan_batch(
    batch: MemoryBatch, gates: Gates, labeled: MemoryState, unlabeled: MemoryState, read: Read
) -> ScanResult:
    """What checked samples do to both memories, whose features only `read` looks at."""
    with full_precision(batch.keys.device):
        keys = torch.cat([batch.keys, batch.unlabeled_keys]).to(statistics_dtype(batch.keys.dtype))
        scores, norms, unlabeled_scores, unlabeled_norms = read(keys, keys[batch.keys.shape[0] :])
        result = scan(
            ScanInput(
                scores, unlabeled_scores, product(keys, keys.mT), _stacked(gates, scores), batch.labels,
                batch.sample_ids, _slots(labeled, norms), _slots(unlabeled, unlabeled_norms),
                gates.decay, gates.decay_unlabeled, scalar_keys=keys.shape[1] == 1,
            )
        )  # fmt: skip
    # Elsewhere than on the CPU reading the flag would wait for the device: there it is for the caller to read.
    if may_look_at(result.fault) and result.fault:
        raise ValueError(sentence_of(int(result.fault)))
    return result


def _slots(state: MemoryState, square_norms: Tensor) -> Slots:
    square_norms = square_norms.detach()
    dtype = square_norms.dtype
    return Slots(
        square_norms, state.usage.detach().to(dtype), state.evaluation.detach().to(dtype),
        state.labels, state.sample_ids, state.least_used,
    )  # fmt: skip


def _stacked(gates: Gates, like: Tensor) -> Tensor:
    """(3,) alpha, alpha' and beta."""
    # A number is filled in on the device: a copy from the host would break the capture of a CUDA graph.
    values = (gates.alpha, gates.alpha_unlabeled, gates.beta)
    return torch.stack([g.to(like.dtype) if isinstance(g, Tensor) else like.new_full((), g) for g in values])


def _storable(keys: Tensor, fault: Tensor) -> Tensor:
    """The keys as they are written: a batch with a fault has weight 0, and 0 times NaN must be 0."""
    return keys.detach().masked_fill(fault != 0, 0.0)


def _after(memory: PendingMemory, keys: Tensor, written: WrittenSlots, fault: Tensor) -> PendingMemory:
    if keys.shape[0] == 0:
        return memory
    up_to_date = written._asdict()
    kept, held = up_to_date.pop("kept"), up_to_date.pop("held")
    return memory.after(kept, held, _storable(keys, fault), **up_to_date)


def _new_state(old: MemoryState, keys: Tensor, written: WrittenSlots, fault: Tensor) -> MemoryState:
    if keys.shape[0] == 0:
        return with_statistics(MemoryState(*(x.detach().clone() for x in old)))
    features, _ = memory_commit(old.features.detach(), written.kept, written.held, _storable(keys, fault))
    return MemoryState(
        features, written.labels, written.usage, written.evaluation, written.least_used, written.sample_ids
    )
