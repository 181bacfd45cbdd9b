"""Where the host reads from the device within a training iteration, and what it still finds out in time."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dan_fast
from dan_fast.core.types import MemoryStep
from dan_fast.daml import Stage
from dan_fast.nn import DAN
from dan_fast.training import MetaStep
from dan_fast.training.objective import DivergedError
from dan_fast.training.scalars import Scalars
from dan_fast.training.step_scalars import StepScalars
from tests.support.steps import decide, split, tiny_step
from tests.support.training_runs import snapshot

PACKAGE = Path(dan_fast.__file__).parent
# Operators whose result, or the size of it, the host has to know. `index` only with a mask, which it counts.
WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "index"} | {
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"
}  # fmt: skip
# Where copies start that are not waited for.
TO_DEVICE = MetaStep._to_device.__code__
# Methods that copy to the host; on the CPU they do not reach an operator.
COPYING = {"cpu", "tolist", "numpy", "__array__"}


def calling() -> FrameType | None:
    """The frame of the package that called an operator; its modes only hand on what others call."""
    frame = sys._getframe(1)
    while frame and (
        not Path(frame.f_code.co_filename).is_relative_to(PACKAGE) or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    return frame


@contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Counts by place ("training/step.py") what would make the host wait for a GPU."""
    places: Counter[str] = Counter()

    def count(name: str) -> None:
        frame = calling()
        places[f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)}" if frame else name] += 1

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.__name__.split(".")[0]
            masked = name != "index" or any(each is not None and each.dtype == torch.bool for each in args[1])
            if name in WAITING and masked:
                count(name)
            return func(*args, **(kwargs or {}))

    class Methods(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            to_host = name == "to" and any(str(each) == "cpu" for each in (*args[1:], *(kwargs or {}).values()))
            if name in COPYING or (to_host and getattr(calling(), "f_code", None) is not TO_DEVICE):
                count(name)
            return func(*args, **(kwargs or {}))

    with Operators(), Methods():
        yield places


@pytest.mark.parametrize(
    "read",
    [
        lambda x: bool(x[0] > 0),
        lambda x: x[0].item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: float(x[0]),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
    ],
)
def test_the_counter_sees_a_read(read):
    with host_reads() as places:
        read(torch.ones(2))
    assert places.total() >= 1


@pytest.fixture
def scalars(tmp_path) -> Scalars:
    return Scalars(tmp_path)


@pytest.fixture
def step_scalars() -> StepScalars:
    """As the trainer has them; with true labels and identities of ten unlabelled images."""
    truth = SimpleNamespace(true_labels=torch.arange(10) % 3, true_ids=torch.arange(10))
    return StepScalars(truth, torch.device("cpu"), adversary=True)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("procedure", "stage", "expected"),
    [
        # Once after S: who won the competition decides what is differentiated next, so the host has to know. Once
        # before the optimizer's step: a feature or gradient that is not finite may not reach a parameter.
        ("daml3", Stage.ATTENTION, 2),
        ("daml3", Stage.ADVERSARY, 2),
        # No competition: only the one before the step.
        ("daml2", None, 1),
    ],
)
def test_the_host_reads_from_the_device_only_where_it_must(scalars, step_scalars, procedure, stage, expected, order):
    meta_step = tiny_step(procedure=procedure, order=order)
    decide(meta_step, stage)
    batch = split(1), split(2)
    with host_reads() as places:
        step_scalars.add(scalars, meta_step.step(*batch))
    # On the CPU, and there only, batches, memory and attention head look at their labels at once, without a wait.
    at_once = {"core/batches.py": 4, "functional/memory/step.py": 2, "core/attention_checks.py": 2}
    assert places == {**at_once, "training/step.py": expected}


def poisoned(network: DAN, monkeypatch: pytest.MonkeyPatch, field: str, call: int) -> None:
    """NaN in one sample's `field` of the network's output in the given pass."""
    calls = iter(range(9))
    forward = network.branches

    def spoilt(*arguments):
        out = forward(*arguments)
        if next(calls) != call:
            return out
        value = getattr(out, field).clone()
        value[0, -1] = torch.nan  # beyond the keys: the memory would not see it
        return out._replace(**{field: value})

    monkeypatch.setattr(network, "branches", spoilt)


@pytest.mark.parametrize("procedure", ["daml3", "daml2"])
@pytest.mark.parametrize("field", ["attended", "pooled"])
@pytest.mark.parametrize("call", [0, 1])
def test_a_feature_that_is_not_finite_reaches_neither_memory_nor_parameters(monkeypatch, procedure, field, call):
    meta_step = tiny_step(procedure=procedure)
    decide(meta_step, Stage.ATTENTION)
    memory = meta_step.model.memory
    poisoned(meta_step.model.network, monkeypatch, field, call)
    params = snapshot(meta_step.model)
    before = memory.labeled, memory.unlabeled
    advanced = []
    forward = memory.forward
    monkeypatch.setattr(memory, "forward", lambda *a, **k: advanced.append(forward(*a, **k)) or advanced[-1])
    with pytest.raises(DivergedError, match="^features or their squared norms are not finite$"):
        meta_step.step(split(1), split(2))
    assert all(torch.equal(value, params[name]) for name, value in meta_step.model.named_parameters())
    assert not meta_step.optimizer.state
    # What S has written stays, as before any error in S~; the pass with the error writes nothing.
    expected = (advanced[-1].labeled, advanced[-1].unlabeled) if call else before
    assert len(advanced) == call
    for held, wanted in zip((memory.labeled, memory.unlabeled), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(held, wanted, strict=True))


class FlagLater(torch.nn.Module):
    """A memory as on a GPU: what it finds is a flag to be read later, beside a loss that is NaN."""

    def __init__(self, memory: torch.nn.Module, faults: list[int]) -> None:
        super().__init__()
        self.memory, self.faults, self.gates, self.dtype = memory, faults, memory.gates, memory.dtype
        self.gate_values, self.occupied_slots = memory.gate_values, memory.occupied_slots

    def forward(self, keys: Tensor, labels: Tensor, unlabeled_keys: Tensor, sample_ids: Tensor, gate_features=None):
        self.fault = torch.tensor(self.faults.pop(0), dtype=torch.int32)
        if self.fault == 0:
            return self.memory(keys, labels, unlabeled_keys, sample_ids)
        return MemoryStep(keys.sum() * torch.nan, torch.full_like(sample_ids, -1), None, None)

    def take_fault(self) -> Tensor:
        return self.fault


@pytest.mark.parametrize("procedure", ["daml3", "daml2"])
# With S~ at weights that a NaN has moved, its features and its memory step are wrong as well; S is the cause.
@pytest.mark.parametrize("faults", [[4, 1], [0, 4]], ids=str)
def test_a_fault_of_the_memory_is_read_with_the_rest_and_named(procedure, faults):
    meta_step = tiny_step(procedure=procedure)
    decide(meta_step, Stage.ATTENTION)
    meta_step.model.memory = FlagLater(meta_step.model.memory, list(faults))
    params = snapshot(meta_step.model)
    with pytest.raises(ValueError, match="^labels must not be negative"):
        meta_step.step(split(1), split(2))
    assert all(torch.equal(value, params[name]) for name, value in meta_step.model.named_parameters())
    assert not meta_step.optimizer.state
