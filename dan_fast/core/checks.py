"""Checks of what goes into the memory operators, shared by every implementation of them.

Each error names the argument and the remedy: a TypeError for a wrong type or dtype, a ValueError for a wrong shape,
device or value. Values are looked at in a single transfer to the host.
"""

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dan_fast.core.cosine import FLOATING, statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState

# What may be wrong with the values of a memory step, in the order in which it is looked for.
_FINITE = "must be finite and so must their squared norms: look for NaN, Inf or huge values"
STEP_FAULTS = (
    f"keys {_FINITE}",
    f"unlabeled_keys {_FINITE}",
    "labels must not be negative: -1 marks an empty slot, drop such samples",
    "sample_ids must not be negative: -1 marks an empty slot",
    "alpha must be finite",
    "alpha_unlabeled must be finite",
    "beta must be finite",
    "labeled.least_used must be a slot of that memory, from 0 to one less than it has",
    "unlabeled.least_used must be a slot of that memory, from 0 to one less than it has",
)


def may_look_at(tensor: Tensor) -> bool:
    """Whether reading values of `tensor` neither waits for a device, nor breaks a graph, nor is refused."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling() or in_vmap():
        return False
    # Under FakeTensorMode there are none, and make_fx and torch.func.linearize record what is done to them.
    modes = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY)):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # not imported, so there are none
    return fakes is None or not fakes.is_fake(tensor)


def in_vmap() -> bool:
    """Whether `torch.vmap` is at work, so that a tensor may stand for many; not seen by a compiler that traces."""
    if torch.compiler.is_compiling():
        return False
    transforms = torch._C._functorch.get_interpreter_stack() or ()
    return any(each.key() == torch._C._functorch.TransformType.Vmap for each in transforms)


def _check_tensor(name: str, value: object, shape: Sequence[int | str], dtype: torch.dtype | None) -> None:
    """`shape` holds sizes, or names for sizes that are free; `dtype` None stands for any floating type."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    fits = value.dim() == len(shape) and all(
        isinstance(want, str) or size == want for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:  # else no sentence, which torch.compile cannot make of sizes that are free
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if dtype is None and value.dtype not in FLOATING:
        raise TypeError(f"{name} must have a floating dtype, got {value.dtype}: convert it with .float()")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}: convert it with .to({dtype})")


def check_gate_features(value: object) -> None:
    """(N, 3), N at least 1, of any floating dtype; else TypeError or ValueError."""
    _check_tensor("gate_features", value, ("N", 3), None)
    if value.shape[0] == 0:
        raise ValueError("gate_features must have a row or more, (N, 3) with N >= 1, got (0, 3)")


def check_device(name: str, value: Tensor, device: torch.device, of: str) -> None:
    """`value` is on `device`, that of the argument `of`; else ValueError."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, {of} on {device}: move one with .to(device)")


def _raise_first(flags: Sequence[Tensor], sentences: Sequence[str]) -> None:
    """Raise ValueError with the sentence of the first () bool flag that is true."""
    if flags[0].is_meta:  # a meta tensor has a shape to check but no values
        return
    for found, sentence in zip(torch.stack(list(flags)).tolist(), sentences, strict=True):
        if found:
            raise ValueError(sentence)


def _state_form(name: str, state: object) -> None:
    if not isinstance(state, MemoryState):
        raise TypeError(f"{name} must be a MemoryState, got {type(state).__name__}")
    _check_tensor(f"{name}.features", state.features, ("s", "d"), None)
    slots = state.features.shape[0]
    if 0 in state.features.shape:
        raise ValueError(
            f"{name}.features must hold at least one slot and one number a key, got shape {tuple(state.features.shape)}"
        )
    for field in ("labels", "sample_ids"):
        _check_tensor(f"{name}.{field}", getattr(state, field), (slots,), torch.int64)
    _check_tensor(f"{name}.least_used", state.least_used, (), torch.int64)
    allowed = (state.features.dtype, statistics_dtype(state.features.dtype))
    for field in ("usage", "evaluation"):
        value = getattr(state, field)
        _check_tensor(f"{name}.{field}", value, (slots,), None)
        if value.dtype not in allowed:
            raise TypeError(f"{name}.{field} must be {allowed[1]} like {name}.features, got {value.dtype}")
    for field in state._fields[1:]:
        check_device(f"{name}.{field}", getattr(state, field), state.features.device, f"{name}.features")


def _not_a_slot(state: MemoryState) -> Tensor:
    return (state.least_used < 0) | (state.least_used >= state.features.shape[0])


def check_state(name: str, state: MemoryState) -> None:
    """Check that the tensors of a memory state fit one another.

    Args:
        name: how the error calls the state.
        state: anything; must be a `MemoryState` of s >= 1 slots whose tensors share one device. `usage` and
            `evaluation` have the dtype of `features`, or float32 beside half-precision features; `least_used` is one
            of the slots.
    """
    _state_form(name, state)
    last = state.features.shape[0] - 1
    _raise_first([_not_a_slot(state)], [f"{name}.least_used must be a slot from 0 to {last}"])


def _not_finite(keys: Tensor) -> Tensor:
    return ~keys.detach().to(statistics_dtype(keys.dtype)).square().sum(-1).isfinite().all()


def _check_gate(name: str, gate: object, device: torch.device) -> None:
    if isinstance(gate, Tensor):
        _check_tensor(name, gate, (), None)
        check_device(name, gate, device, "keys")
    elif isinstance(gate, bool) or not isinstance(gate, int | float):
        raise TypeError(f"{name} must be a () tensor or a number, got {type(gate).__name__}")
    elif not math.isfinite(gate):
        raise ValueError(f"{name} must be finite, got {gate}")


def check_memory_step(labeled: MemoryState, unlabeled: MemoryState, batch: MemoryBatch, gates: Gates) -> None:
    """Check the arguments of `memory_step` but for the values in tensors, which `check_step_values` looks at.

    Keys and both memories share one floating dtype and one device; labels and sample ids are int64; gates are
    () tensors or finite numbers; decays lie in [0, 1].
    """
    _state_form("labeled", labeled)
    _state_form("unlabeled", unlabeled)
    memory = labeled.features
    _check_tensor("unlabeled.features", unlabeled.features, ("s", memory.shape[1]), memory.dtype)
    _check_tensor("keys", batch.keys, ("B", memory.shape[1]), memory.dtype)
    _check_tensor("labels", batch.labels, (batch.keys.shape[0],), torch.int64)
    _check_tensor("unlabeled_keys", batch.unlabeled_keys, ("B'", memory.shape[1]), memory.dtype)
    _check_tensor("sample_ids", batch.sample_ids, (batch.unlabeled_keys.shape[0],), torch.int64)
    for name, value in {"unlabeled.features": unlabeled.features, **batch._asdict()}.items():
        check_device(name, value, memory.device, "labeled.features")
    for name, rate in (("decay", gates.decay), ("decay_unlabeled", gates.decay_unlabeled)):
        if isinstance(rate, bool) or not isinstance(rate, int | float):
            raise TypeError(f"{name} must be a number, got {type(rate).__name__}")
        if not 0 <= rate <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {rate}")
    for name in ("alpha", "alpha_unlabeled", "beta"):
        _check_gate(name, getattr(gates, name), memory.device)


def check_step_values(labeled: MemoryState, unlabeled: MemoryState, batch: MemoryBatch, gates: Gates) -> None:
    """Check the values that `check_memory_step` leaves alone for the faults of `STEP_FAULTS`."""
    values = (gates.alpha, gates.alpha_unlabeled, gates.beta)
    flags = [
        _not_finite(batch.keys),
        _not_finite(batch.unlabeled_keys),
        (batch.labels < 0).any(),
        (batch.sample_ids < 0).any(),
        *(~torch.as_tensor(gate, device=batch.keys.device).detach().isfinite() for gate in values),
        _not_a_slot(labeled),
        _not_a_slot(unlabeled),
    ]
    _raise_first(flags, STEP_FAULTS)


def check_cosine_softmax(keys: Tensor, slots: Tensor, occupied: Tensor | None) -> None:
    """Check the arguments of `cosine_softmax` but for the values of keys, which `check_keys_finite` looks at."""
    _check_tensor("keys", keys, ("B", "d"), None)
    _check_tensor("slots", slots, ("s", keys.shape[1]), keys.dtype)
    check_device("slots", slots, keys.device, "keys")
    if occupied is not None:
        _check_tensor("occupied", occupied, (slots.shape[0],), torch.bool)
        check_device("occupied", occupied, keys.device, "keys")


def check_keys_finite(keys: Tensor) -> None:
    """Raise ValueError where a key or its squared norm is not finite."""
    _raise_first([_not_finite(keys)], STEP_FAULTS[:1])


def check_false_sample_sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> None:
    """Check the arguments of `false_sample_sets`."""
    _check_tensor("evaluation", evaluation, ("B", "s"), None)
    _check_tensor("labels", labels, (evaluation.shape[1],), torch.int64)
    _check_tensor("pseudo_labels", pseudo_labels, (evaluation.shape[0],), torch.int64)
    check_device("labels", labels, evaluation.device, "evaluation")
    check_device("pseudo_labels", pseudo_labels, evaluation.device, "evaluation")


def check_keys(keys: object, features: Tensor) -> None:
    """Check that keys (B, d) fit the features (s, d) of a labelled memory, but for their values."""
    _check_tensor("keys", keys, ("B", features.shape[1]), features.dtype)
    check_device("keys", keys, features.device, "labeled.features")


def check_discriminative_loss(
    keys: object, labels: object, slots: object, slot_labels: object, temperature: float
) -> None:
    """Check the arguments of `discriminative_loss`: a slot or more, and a temperature that is positive and finite."""
    _check_tensor("keys", keys, ("B", "d"), None)
    _check_tensor("labels", labels, (keys.shape[0],), torch.int64)
    _check_tensor("slots", slots, ("s", keys.shape[1]), keys.dtype)
    _check_tensor("slot_labels", slot_labels, (slots.shape[0],), torch.int64)
    for name, value in (("labels", labels), ("slots", slots), ("slot_labels", slot_labels)):
        check_device(name, value, keys.device, "keys")
    if slots.shape[0] == 0:
        raise ValueError("slots must hold at least one slot, got none")
    # A tensor that is learnt has a gradient, which PyTorch warns about where its number is read.
    number = temperature.detach() if isinstance(temperature, Tensor) else temperature
    if not (number > 0 and math.isfinite(number)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
