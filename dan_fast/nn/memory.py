"""The progressive augmentation memory as a module: it keeps M and M' and learns how to write to them."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from dan_fast.core.checks import check_gate_features, check_keys
from dan_fast.core.cosine import FLOATING, statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState, MemoryStep
from dan_fast.distributed.collectives import ProcessGroup
from dan_fast.distributed.shards import check_group
from dan_fast.functional.autocast import keys_in_memory_dtype
from dan_fast.functional.discriminative import discriminative_loss, sharded_discriminative_loss
from dan_fast.functional.memory.pending import LazyStep, PendingMemory
from dan_fast.functional.memory.scan_types import sentence_of
from dan_fast.functional.memory.sharded import ShardedMemory
from dan_fast.functional.memory.step import pending_memory_step, sharded_memory_step
from dan_fast.nn.memory_copies import Origin, Writes, is_left_behind, require_to_be_carried, versions_of
from dan_fast.nn.memory_states import joined, memories_of, parted, reliable_samples_of, replacement

_INITIAL_BETA = 0.1


def _settles_each_step(device: torch.device) -> bool:
    """Whether nothing may wait from step to step.

    A GPU's passes over settled and over waiting memories round differently, and a state that was saved is settled: in a
    training that is to repeat itself what is computed may not depend on when that was.
    """
    return device.type == "cuda" and torch.are_deterministic_algorithms_enabled()


class ProgressiveAugmentedMemory(nn.Module):
    """M and M' of Sec. III-C with their learnable gates; every forward advances both, in eval mode too.

    New features wait beside the memories until the pass that scores the next batch folds them in (later, 128 at most,
    where a graph or an earlier step needs the memory as it was), or `labeled`, `unlabeled`, `state_dict` or a step's
    states are read. This changes results by rounding only; `reliable_samples` and `occupied_slots` read no features.
    The tensors read are a snapshot: assign a new state instead of changing them in place.

    The memories are in the state dict (`labeled.features`, ... `unlabeled.sample_ids`) and follow `.to()`; a
    `copy.deepcopy` has memories of its own. They are not buffers, and code that knows only parameters and buffers does
    not carry them:

    - `DistributedDataParallel` keeps gates equal, not memories: each process would write its own rows. Forward refuses
      it beyond one process. Call the memory outside the wrapped module, with `process_group` and each process's own
      rows. The same holds for FSDP and other wrappers, but forward cannot detect them.
    - `DataParallel` hands every device a copy and throws it away; forward refuses it. Wrap the backbone alone.
    - `AveragedModel` averages the gates of a copy whose memories stay what they were when it was made; forward refuses
      that copy, but cannot tell where the gates are features. Give it memories first:
      `averaged.labeled, averaged.unlabeled = memory.labeled, memory.unlabeled`.
      Averages over a state dict, as timm's `ModelEmaV2`, mix slots of different samples: leave the memory out.
    - Activation checkpointing would write each batch again in the backward pass; forward refuses that. Checkpoint only
      what makes the keys. `labeled_loss` may be computed again as long as nothing has been written in between.

    With `process_group` the slots are divided over its ranks, each of which keeps the features of its share and hands
    in its own rows; rows of a batch may be divided in any way, and a rank may have none. The batch is rank 0's labelled
    rows, rank 1's, ..., then the unlabelled ones likewise. The loss is the whole batch's, the same on every rank and
    counted once: its gradient in a rank's own rows is that of the whole loss, and so are the gates' gradients, equal on
    all ranks. So sum (do not average) over ranks the gradients of what made the rows, and leave the gates' as they are.
    Second derivatives follow the same rule. Where kernels run on CPUs, the memory is bit for bit that of a single rank;
    on GPUs up to rounding, because a single rank whose state was read writes the next keys in a pass of their own.
    Forward, backward through it, `labeled`, `unlabeled`, `state_dict` and a step's states are collective: ranks call
    them in the same order. Assigning and loading states, `reliable_samples`, `occupied_slots` and `settle` are not.

    Args:
        labeled_slots: s1, slots of M.
        unlabeled_slots: s2, slots of M'.
        key_dim: d, length of a key; 3 less than the backbone's output.
        decay: kappa1 of Eq. (5), in [0, 1].
        decay_unlabeled: kappa2 of Eq. (12), in [0, 1].
        dtype: of the keys and the stored features. Everything else is float32 for half-precision features.
        gates: `"parameters"`: Table II's learnable scalars, `alpha` and `alpha_unlabeled` (raw, start 0) and
            `beta_logit` (`beta` is its sigmoid; beta starts at 0.1). `"features"`: Sec. IV-B's last three outputs of
            the backbone, averaged over the rows given, are the two raw gates and the logit of beta; the three
            parameters are then None.
        process_group: the ranks that share the memory, each making this module with the same settings; None: one
            process holds all of it.

    Raises:
        ValueError: no slot, no key, a decay not in [0, 1], an unknown `gates`, or fewer slots than ranks.
        TypeError: `dtype` is not a floating type, or `process_group` is no group of this process.

    Example:
        >>> memory = ProgressiveAugmentedMemory(labeled_slots=4, unlabeled_slots=4, key_dim=2)
        >>> key = torch.tensor([[1.0, 0.0]])
        >>> step = memory(key, torch.tensor([7]), key, torch.tensor([0]))
        >>> step.pseudo_labels, memory.reliable_samples()
        (tensor([7]), (tensor([0]), tensor([7])))
    """

    def __init__(
        self,
        labeled_slots: int = 9000,
        unlabeled_slots: int = 5500,
        key_dim: int = 2045,
        decay: float = 0.99,
        decay_unlabeled: float = 0.99,
        dtype: torch.dtype = torch.float32,
        gates: str = "parameters",
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        for name, rate in (("decay", decay), ("decay_unlabeled", decay_unlabeled)):
            if not 0 <= rate <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {rate}")
        sizes = {"labeled_slots": labeled_slots, "unlabeled_slots": unlabeled_slots, "key_dim": key_dim}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
        if dtype not in FLOATING:
            raise TypeError(f"dtype must be a floating type as torch.float32, of 16 bits or more, got {dtype}")
        if gates not in ("parameters", "features"):
            raise ValueError(f'gates must be "parameters" or "features", got {gates!r}')
        if process_group is not None:
            check_group(process_group, labeled_slots=labeled_slots, unlabeled_slots=unlabeled_slots)
        self.process_group = process_group
        self.decay, self.decay_unlabeled, self.gates = float(decay), float(decay_unlabeled), gates
        self._labeled, self._unlabeled = (
            PendingMemory.of(MemoryState.empty(slots, key_dim, dtype))
            if process_group is None
            else ShardedMemory.empty(process_group, slots, key_dim, dtype)
            for slots in (labeled_slots, unlabeled_slots)
        )
        self._fault: Tensor | None = None
        self._writes = Writes()
        self._origin: Origin | None = None
        start = {"alpha": 0.0, "alpha_unlabeled": 0.0, "beta_logit": math.log(_INITIAL_BETA / (1 - _INITIAL_BETA))}
        for name, value in start.items():
            gate = torch.tensor(value, dtype=statistics_dtype(dtype))
            self.register_parameter(name, nn.Parameter(gate) if gates == "parameters" else None)

    @property
    def key_dim(self) -> int:
        """d, the length of a key."""
        return self._labeled.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the keys and the stored features, which `.to()` changes."""
        return self._labeled.base.dtype

    @property
    def beta(self) -> Tensor:
        """() confidence in pseudo labels, the sigmoid of `beta_logit`; see `gate_values` for other gates."""
        return self.gate_values()[2]

    def gate_values(self, gate_features: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """() raw alpha and alpha' of Eq. (8) and beta of Eqs. (12) and (15) as forward uses them, with gradient.

        Args:
            gate_features: (N, 3), the backbone's last three outputs; for `gates="features"` only.

        Raises:
            TypeError, ValueError: `gate_features` is missing, not needed, no floating tensor, or of another shape.
        """
        if self.gates == "parameters":
            if gate_features is not None:
                raise ValueError('gate_features are for gates="features": leave them out, or make such a memory')
            return self.alpha, self.alpha_unlabeled, torch.sigmoid(self.beta_logit)
        if gate_features is None:
            raise ValueError('gate_features must be given, (N, 3), because gates="features"')
        check_gate_features(gate_features)
        alpha, alpha_unlabeled, beta_logit = gate_features.mean(0).unbind()
        return alpha, alpha_unlabeled, torch.sigmoid(beta_logit)

    def _gates(self, gate_features: Tensor | None) -> Gates:
        return Gates(*self.gate_values(gate_features), self.decay, self.decay_unlabeled)

    def forward(
        self,
        keys: Tensor,
        labels: Tensor,
        unlabeled_keys: Tensor | None = None,
        sample_ids: Tensor | None = None,
        gate_features: Tensor | None = None,
    ) -> MemoryStep:
        """Write a mini-batch and return L_lde, Eqs. (5)-(16); the rules are `functional.memory_step`'s.

        Collective with a `process_group`; the arguments and `pseudo_labels` are then this rank's own rows.

        Args:
            keys, labels: (B, d), and (B,) int64, of labelled samples.
            unlabeled_keys, sample_ids: (B', d), and (B',) int64, which image each comes from; both left out: none.
            gate_features: (N, 3), the backbone's last three outputs, on each rank N >= 1; `gates="features"` only.

        Returns:
            `MemoryStep`; reading its states settles the memories.

        Raises:
            TypeError, ValueError: an argument does not fit, here or on another rank; both memories are as they were.
                What is wrong with the values in tensors on a GPU is for `check_faults` or `take_fault` to say.
            RuntimeError: a CUDA graph is being captured (`functional.memory_step` can be), or the memory is inside a
                wrapper that would let it fall behind or a backward pass; the message says which and what to do.
        """
        require_to_be_carried(self, self._origin)
        if unlabeled_keys is None and sample_ids is None:
            unlabeled_keys, sample_ids = keys[:0], labels[:0]
        memories, batch = (self._labeled, self._unlabeled), MemoryBatch(keys, labels, unlabeled_keys, sample_ids)
        if self.process_group is None:
            stepped = pending_memory_step(*memories, batch, self._gates(gate_features))
        else:
            stepped = sharded_memory_step(*memories, batch, gate_features, self._gates)
        result, self._labeled, self._unlabeled = stepped
        self._writes.count += 1
        self._origin = None
        if _settles_each_step(self._labeled.base.device):
            self.settle()
        if result.fault.device.type != "cpu":
            self._fault = result.fault if self._fault is None else self._fault | result.fault
        return LazyStep(result.loss, result.pseudo_labels, self._labeled, self._unlabeled)

    def labeled_loss(
        self, keys: Tensor, labels: Tensor, temperature: float, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """`functional.discriminative_loss` of labelled keys by M as it is; nothing is written to M.

        Args:
            keys: (B, d); labels: (B,) int64; this rank's own rows with a `process_group`, where this is collective.
            temperature: positive.
            sizes: with a `process_group`, B of each rank.

        Returns:
            (B,), of the rows of all ranks with a `process_group`: whole, as the loss of `forward` is.

        Raises:
            TypeError, ValueError: an argument does not fit; a rank raises alone. Under autocast keys get M's dtype.
        """
        require_to_be_carried(self, self._origin)
        keys = keys_in_memory_dtype(keys, self.dtype)
        check_keys(keys, self._labeled.base)
        if self.process_group is not None:
            return sharded_discriminative_loss(self._labeled, keys, labels, sizes, temperature)
        # It has to be settled to be read, so the next write copies M.
        state = self.labeled
        return discriminative_loss(keys, labels, state.features, state.labels, temperature)

    def check_faults(self) -> None:
        """Raise what was wrong with the values of a batch on the GPU since the last call.

        On the CPU forward raises at once. On a GPU that would make it wait, so it leaves both memories as they were,
        returns NaN as the loss and sets a flag there; reading the flag waits for the device, so do it where the losses
        are read anyway.

        Raises:
            ValueError: keys or gates were not finite, or a label or sample id was negative.
        """
        fault = self.take_fault()
        if fault is not None and (code := int(fault)):
            raise ValueError(sentence_of(code))

    def take_fault(self) -> Tensor | None:
        """Take the flag that `check_faults` reads and clear it, without waiting for the device.

        Returns:
            () int32 on the device, 0 if all was well; None where forward raises at once, as on the CPU.
        """
        fault, self._fault = self._fault, None
        return fault

    @property
    def labeled(self) -> MemoryState:
        """M. Assigning copies a state of the same shape, dtype and device.

        With a `process_group` reading is collective and gives the whole on every rank; assign the whole on each.
        """
        return self._labeled.snapshot()

    @labeled.setter
    def labeled(self, state: MemoryState) -> None:
        self._labeled = replacement("labeled", self._labeled, state)
        self._origin = self._origin and self._origin.after_assigning("labeled")

    @property
    def unlabeled(self) -> MemoryState:
        """M'. Assigning copies a state of the same shape, dtype and device; collective as `labeled` is."""
        return self._unlabeled.snapshot()

    @unlabeled.setter
    def unlabeled(self, state: MemoryState) -> None:
        self._unlabeled = replacement("unlabeled", self._unlabeled, state)
        self._origin = self._origin and self._origin.after_assigning("unlabeled")

    def settle(self) -> None:
        """Fold what waits into both memories; when to do so changes results by rounding only.

        Not at all on the CPU, nor on a GPU under `torch.use_deterministic_algorithms`, where each step ends with it.
        """
        self._labeled.settle()
        self._unlabeled.settle()

    def occupied_slots(self) -> tuple[Tensor, Tensor]:
        """How many slots of M and of M' hold a sample: two () int64 tensors."""
        return (self._labeled.labels >= 0).sum(), (self._unlabeled.labels >= 0).sum()

    def reliable_samples(self) -> tuple[Tensor, Tensor]:
        """The content of M' to feed back as labelled samples, in the order of the slots; never collective.

        An image that sits in several slots is returned once, with the pseudo label of its most used slot (the
        lowest among equals).

        Returns:
            `(sample_ids (n,), pseudo_labels (n,))`, int64.
        """
        return reliable_samples_of(self._unlabeled)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProgressiveAugmentedMemory":
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.process_group)] = self.process_group  # belongs to the ranks, not to a memory
        copied.__setstate__(copy.deepcopy(self.__dict__, memo))
        copied._writes = Writes()
        known = {"left_behind": True, "stale": self._origin.stale} if is_left_behind(self._origin) else {}
        copied._origin = Origin(self._writes, self._writes.count, versions_of(copied.parameters()), **known)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_writes": Writes(), "_origin": self._origin and self._origin.in_a_file()}

    def extra_repr(self) -> str:
        labeled_slots, unlabeled_slots = self._labeled.shape[0], self._unlabeled.shape[0]
        return (
            f"labeled_slots={labeled_slots}, unlabeled_slots={unlabeled_slots}, key_dim={self.key_dim}, "
            f"decay={self.decay}, decay_unlabeled={self.decay_unlabeled}, dtype={self.dtype}, gates={self.gates!r}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ProgressiveAugmentedMemory":
        left_behind = is_left_behind(self._origin)
        super()._apply(fn, recurse)
        self._origin = self._origin and self._origin.moved(self.parameters(), left_behind)
        self._labeled, self._unlabeled = self._labeled.mapped(fn), self._unlabeled.mapped(fn)
        self._fault = None if self._fault is None else self._fault.to(fn(self._fault).device)
        return self

    def parted_state_dict(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The state dict in two: what every rank holds, and the features of this rank's slots; not collective.

        The tensors are the memory's own, which its next step may overwrite: write or copy them before it.
        """
        whole: dict[str, Tensor] = {name: value.detach() for name, value in self.named_parameters()}
        features = {}
        for memory, held in (("labeled", self._labeled), ("unlabeled", self._unlabeled)):
            rest, features[f"{memory}.features"] = parted(held)
            whole |= {f"{memory}.{field}": value for field, value in rest.items()}
        return whole, features

    def load_parted_state_dict(self, whole: Mapping[str, Tensor], read: Callable[[str, slice], Tensor]) -> None:
        """Go on from what `parted_state_dict` gave on any number of ranks; not collective.

        Args:
            whole: its first part.
            read: features of a range of slots, by their name in the second part; they are copied.

        Raises:
            ValueError: a memory of another number of slots or numbers, or one that is not whole; all is as it was.
        """
        gates = [*self.named_parameters()]
        loaded = joined({"labeled": self._labeled, "unlabeled": self._unlabeled}, dict(gates), whole, read)
        with torch.no_grad():
            for name, value in gates:
                value.copy_(whole[name])
        self._labeled, self._unlabeled = loaded
        self._origin = None

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        # Collective with a process group: every rank gets the whole.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for memory, state in (("labeled", self.labeled), ("unlabeled", self.unlabeled)):
            for field, value in state._asdict().items():
                destination[f"{prefix}{memory}.{field}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        held = {f"{prefix}labeled": self._labeled, f"{prefix}unlabeled": self._unlabeled}
        found = memories_of(state_dict, held, local_metadata.get("assign_to_params_buffers", False))
        missing_keys += found.missing
        error_msgs += found.errors
        if found.errors:  # PyTorch will raise: before the gates are touched
            return
        super()._load_from_state_dict(
            found.rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # Keys that are missing or not expected are for the caller's `strict` to judge, which is not known here.
        if found.loaded and not error_msgs:
            self._labeled, self._unlabeled = (held | found.loaded).values()
            if self._origin is not None:
                self._origin = self._origin.after_assigning(*(name.removeprefix(prefix) for name in found.loaded))
