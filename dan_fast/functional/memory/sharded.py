"""A memory whose slots are divided over ranks, and what the ranks exchange for a step.

Features are divided; labels, usage, norms and what is pending are whole on every rank, and each runs the same scan over
the gathered scores. In a pass a row's score has the same bits whichever rank computes it, so on CPUs the memory is bit
for bit the one that a single rank would hold. On GPUs it is so up to rounding: a single rank hands out its own features
as a snapshot, so its next commit goes to new ones and scores in a further pass; ranks, which hand out a copy, do both
in one. A step gathers three times, a few numbers, the batch and the scores, and its backward pass adds up the gradient
of the keys once.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dan_fast import __version__, _extension
from dan_fast.core.checks import check_memory_step
from dan_fast.core.cosine import statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState
from dan_fast.distributed.collectives import ProcessGroup, all_gather, gather_parts, hand_out
from dan_fast.distributed.shards import Shard, check_backend
from dan_fast.functional.memory.pending import PendingMemory

GatesOf = Callable[[Tensor | None], Gates]  # from the whole batch's gate features


@dataclass(eq=False)
class ShardedMemory(PendingMemory):
    """A `PendingMemory` that holds the features of its rank's slots, `shard.rows`, and everything else whole."""

    shard: Shard | None = None

    @classmethod
    def empty(cls, group: ProcessGroup, slots: int, key_dim: int, dtype: torch.dtype) -> "ShardedMemory":
        """A memory of empty slots, of which no rank ever holds more features than its own."""
        shard, state = Shard(group, slots), MemoryState.empty(slots, 1, statistics_dtype(dtype))
        own = state.features.new_zeros(shard.sizes[group.rank()], key_dim, dtype=dtype)
        return cls.of(state._replace(features=own), shard=shard)

    def __reduce__(self) -> tuple:
        # What other ranks hold takes a collective, and one rank alone would wait for them.
        raise TypeError("a memory divided over ranks cannot be pickled: save its state_dict(), which holds all of it")

    def like(self, state: MemoryState) -> "ShardedMemory":
        return self.of(state, shard=self.shard)

    @property
    def rows(self) -> slice:
        return self.shard.rows

    def _of_rows(self, kept: Tensor, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows
        return kept[rows], weights[:, rows], keys

    def outlined(self) -> MemoryState:
        """The memory with features of the whole's shape, whose values mean nothing."""
        return self.unsettled()._replace(features=self.base[:1].expand(self.shape))

    def snapshot(self) -> MemoryState:
        """The whole state on every rank; collective."""
        check_backend(self.shard.group, self.base.device)
        self.settle()
        (features,) = gather_parts(self.shard.group, [self.base], [self.shard.sizes], 0)
        return self.unsettled()._replace(features=features)


def read_shards(
    labeled: ShardedMemory, unlabeled: ShardedMemory, waits: tuple[bool, bool], keys: Tensor, unlabeled_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `PendingMemory.read` finds in the whole of each memory, in one collective.

    Args:
        labeled, unlabeled: M and M'.
        waits: what `PendingMemory.read_base` takes for each, the same on all ranks.
        keys: (B + B', d), whole, in the dtype of statistics.
        unlabeled_keys: (B', d), the last of them.

    Returns:
        Scores (B + B', s1) and square norms (s1,) of M, and (B', s2) and (s2,) of M'.
    """
    group = labeled.shard.group
    own_keys = hand_out(group, keys)
    first, sizes = keys.shape[0] - unlabeled_keys.shape[0], (labeled.shard.sizes, unlabeled.shard.sizes)
    own = [*labeled.read_base(own_keys, waits[0]), *unlabeled.read_base(own_keys[first:], waits[1])]
    scores, norms, *of_unlabeled = gather_parts(group, own, [sizes[0], sizes[0], sizes[1], sizes[1]], -1)
    return *labeled.completed(keys, scores, norms), *unlabeled.completed(unlabeled_keys, *of_unlabeled)


@dataclass
class Exchange:
    """A batch gathered from all ranks.

    Attributes:
        batch: the labelled rows of rank 0, of rank 1, ..., then the unlabelled ones likewise.
        gates: of the whole batch.
        waits: as of `read_shards`.
        own_unlabeled: where this rank's rows are among the unlabelled ones.
    """

    batch: MemoryBatch
    gates: Gates
    waits: tuple[bool, bool]
    own_unlabeled: slice


def exchange(
    labeled: ShardedMemory,
    unlabeled: ShardedMemory,
    batch: MemoryBatch,
    gate_features: Tensor | None,
    gates_of: GatesOf,
) -> Exchange:
    """Gather the batch, after all ranks have found their own rows in order; two collectives.

    Raises:
        TypeError, ValueError: this rank's rows do not fit, another rank's do not, or ranks cannot go on together.
    """
    group, device = labeled.shard.group, labeled.base.device
    check_backend(group, device)
    refused, gates = None, None
    try:
        gates = gates_of(gate_features)
        check_memory_step(labeled.outlined(), unlabeled.outlined(), batch, gates)
    except (TypeError, ValueError) as error:
        refused = error
    # Where a rank raised alone the others would wait for it: whether one refuses is exchanged first.
    headers = all_gather(group, _header(labeled, unlabeled, batch, gate_features, gates, refused))[0].tolist()
    ranks = [dict(zip(_HEADER, row, strict=True)) for row in headers]
    if refused is not None:
        try:
            raise refused
        finally:
            # Its traceback holds this frame: with its name they would keep the memory until garbage is collected, and
            # the next writes would wait.
            del refused
    _check_together(ranks)

    tensors, counts = list(batch), [[rank[name] for rank in ranks] for name in ("rows", "unlabeled_rows")]
    sizes = [counts[0], counts[0], counts[1], counts[1]]
    if gate_features is not None:
        tensors.append(gate_features)
        sizes.append([rank["gate_rows"] for rank in ranks])
    whole = gather_parts(group, tensors, sizes, 0)
    if gate_features is not None:
        gates = gates_of(whole.pop())
    start = sum(counts[1][: group.rank()])
    waits = tuple(
        all(rank[f"{memory}_pending"] for rank in ranks) and any(rank[f"{memory}_waits"] for rank in ranks)
        for memory in ("labeled", "unlabeled")
    )
    return Exchange(MemoryBatch(*whole), gates, waits, slice(start, start + counts[1][group.rank()]))


_HEADER = (
    "refused", "alike", "rows", "unlabeled_rows", "gate_rows", "with_gradient", "labeled_pending", "labeled_waits",
    "unlabeled_pending", "unlabeled_waits", "alpha", "alpha_unlabeled", "beta",
)  # fmt: skip


def _header(
    labeled: ShardedMemory,
    unlabeled: ShardedMemory,
    batch: MemoryBatch,
    gate_features: Tensor | None,
    gates: Gates | None,
    refused: Exception | None,
) -> Tensor:
    """(13,) int64, what the other ranks need of this one before anything is gathered."""
    device = labeled.base.device
    if refused is not None:
        return torch.tensor([1] + [0] * (len(_HEADER) - 1), device=device)
    rows_of_gates = [] if gate_features is None else [gate_features]
    inputs = (batch.keys, batch.unlabeled_keys, *rows_of_gates)
    settings = (labeled.shape, unlabeled.shape, [x.dtype for x in inputs], *gates[3:])
    numbers = [
        0, zlib.crc32(repr((settings, _made_by(device))).encode()),
        batch.keys.shape[0], batch.unlabeled_keys.shape[0], sum(map(len, rows_of_gates)),
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        labeled.pending > 0, labeled.has_to_wait(), unlabeled.pending > 0, unlabeled.has_to_wait(),
    ]  # fmt: skip
    # Gates made from features are those of the whole batch, equal in any case.
    values = [torch.as_tensor(0.0 if rows_of_gates else gate, device=device).double() for gate in gates[:3]]
    return torch.cat([torch.tensor(numbers, device=device), torch.stack(values).detach().view(torch.int64)])


def _made_by(device: torch.device) -> tuple[object, ...]:
    """What decides the last bits of a scan: ranks that differ in it part sooner or later."""
    kernels = _extension.serves(device.type, device.index)
    if device.type == "cuda":
        # Sums are added up in the order of a grid that has as many blocks as the GPU holds at a time.
        properties = torch.cuda.get_device_properties(device)
        processor: object = properties.name, properties.multi_processor_count
    else:
        processor = torch.ops.dan_fast.instruction_set() if kernels else torch.backends.cpu.get_cpu_capability()
    built = _extension.build_info()
    return __version__, torch.__version__, kernels, built.get("source_hash"), built.get("cuda_archs"), processor


def _check_together(ranks: list[dict[str, int]]) -> None:
    """Raise ValueError where the ranks cannot make a step together, on each of them."""
    for rank, its in enumerate(ranks):
        if its["refused"]:
            raise ValueError(
                f"rank {rank} of process_group refused its rows of the batch, see that rank's error: "
                "no memory was changed"
            )
    for rank, its in enumerate(ranks):
        if its["alike"] != ranks[0]["alike"]:
            raise ValueError(
                f"rank {rank} of process_group differs from rank 0: slots, key_dim, dtypes, decays, gates, the "
                "versions of dan_fast and torch, and the kind of GPU or the processor's instruction set must be the "
                "same on all ranks"
            )
        for name in ("alpha", "alpha_unlabeled", "beta"):
            if its[name] != ranks[0][name]:
                raise ValueError(
                    f"{name} on rank {rank} of process_group is not that of rank 0, and the memories would part: "
                    "broadcast the gates and give all ranks the same updates"
                )
        if its["with_gradient"] != ranks[0]["with_gradient"]:
            raise ValueError(
                f"keys on rank {rank} of process_group differ from rank 0's in whether they require a gradient, and "
                "the backward pass needs all ranks: also keys of no rows, (0, d), have to require it"
            )
