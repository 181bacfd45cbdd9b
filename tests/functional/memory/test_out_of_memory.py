"""A pass over a memory that fails, as for want of memory: what is pending is written once."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dan_fast import MemoryState, _extension
from dan_fast.functional.memory import passes, pending
from dan_fast.functional.memory.pending import PendingMemory
from tests.support.toolchain import needs_extension

SLOTS, DIM = 2500, 4  # more slots than PyTorch rewrites at a time


def full(*_: object) -> None:
    raise torch.OutOfMemoryError("full")


def with_writes() -> tuple[PendingMemory, Tensor]:
    """A memory of ones in which 2 waits to be added to every slot but the first, which was cleared; its features."""
    state = MemoryState.empty(SLOTS, DIM)._replace(features=torch.ones(SLOTS, DIM))
    memory = PendingMemory.of(state)
    kept = torch.ones(SLOTS)
    kept[0] = 0
    memory = memory.after(kept, torch.full((1, SLOTS), 2.0), torch.ones(1, DIM), labels=memory.labels)
    expected = torch.full((SLOTS, DIM), 3.0)
    expected[0] = 2
    return memory, expected


def check_written_once(memory: PendingMemory, keys: Tensor, expected: Tensor, is_written: bool) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        memory.read(keys)
    assert torch.equal(memory.base, expected if is_written else torch.ones(SLOTS, DIM))
    assert memory.pending == (0 if is_written else 1)


@pytest.mark.parametrize("scores_fail", [True, False])
def test_the_pytorch_form(monkeypatch: pytest.MonkeyPatch, scores_fail: bool):
    memory, expected = with_writes()
    with _extension.disabled():
        with monkeypatch.context() as patched:
            patched.setattr(*(passes.MemoryScores, "form") if scores_fail else (passes, "_commit_into"), full)
            check_written_once(memory, torch.ones(3, DIM), expected, is_written=scores_fail)
        state = memory.snapshot()
        assert torch.equal(state.features, expected)
        scores, square_norms = memory.read(torch.ones(3, DIM))
    assert torch.equal(scores[1], expected.sum(1)) and torch.equal(square_norms, expected.square().sum(1))


class Written(TorchDispatchMode):
    """Counts the writes to a memory and lists the operators that make new memory after the first of them."""

    def __init__(self, base: Tensor):
        super().__init__()
        self.place, self.writes, self.made = base.data_ptr(), 0, list[str]()

    def __torch_dispatch__(self, func, types, arguments=(), named=None):
        result = func(*arguments, **(named or {}))
        held = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
        if self.writes and result.untyped_storage().data_ptr() not in held:
            self.made.append(func.name())
        if func._schema.is_mutable:
            self.writes += result.untyped_storage().data_ptr() == self.place
        return result


def test_the_pytorch_form_allocates_nothing_between_two_pieces():
    memory, expected = with_writes()
    with Written(memory.base) as written:
        passes._commit_into(memory.base, memory.base, memory.kept, memory.weights, memory.keys)
    assert torch.equal(memory.base, expected)
    assert written.writes == 3 and not written.made


COMMITS = """
import resource
import torch
from dan_fast import _extension
assert _extension.loaded()
torch.set_num_threads(2)
slots, columns = 12, 1 << 20  # a block of rows is 24 MB in float32
base, kept, weights = torch.ones(slots, columns, dtype=torch.bfloat16), torch.ones(slots), torch.ones(1, slots)
def commit():
    pending, keys = torch.ones(1, columns), torch.ones(0, columns)
    torch.ops.dan_fast.memory_commit_scores_(base, kept, weights, pending, keys)
commit()  # starts the threads
assert (base == 2).all()
now = 4096 * int(open("/proc/self/statm").read().split()[0])
failed = 0
for megabytes in range(0, 180, 6):
    before = base[:, 0].clone()
    resource.setrlimit(resource.RLIMIT_AS, (now + (megabytes << 20), -1))
    try:
        commit()
        expected = before + 1
    except (MemoryError, RuntimeError):
        failed, expected = failed + 1, before
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert torch.equal(base[:, 0], expected), (megabytes, base[:, 0])
assert 5 < failed < 25, failed
"""


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space, as Linux has it, is set")
def test_the_kernel_changes_all_rows_or_none():
    # Each larger block is asked of the system, not taken from what was freed before.
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", COMMITS], env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("failing", ["first launch", "second launch"])
def test_a_second_launch_for_more_keys(monkeypatch: pytest.MonkeyPatch, failing: str):
    from dan_fast.triton_kernels import passes as on_gpu

    memory, expected = with_writes()
    events = []

    def launched(kernel: object, grid: object, plan: object, device: object, arguments: tuple) -> None:
        events.append("launch")
        base, target, kept, weights, keys = arguments[:5]
        if target is None or failing == "first launch":
            full()
        # Like a kernel, NumPy writes without PyTorch's knowledge.
        target.numpy()[:] = (kept[:, None] * base + weights.mT @ keys).numpy()

    def allocated(*arguments: object, _empty=torch.empty, **named: object) -> Tensor:
        events.append("empty")
        return _empty(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(pending, "memory_commit_scores_", on_gpu.memory_commit_scores_)
        patched.setattr(on_gpu, "_launch", launched)
        patched.setattr(torch, "empty", allocated)
        keys = torch.ones(on_gpu.MAX_KEYS + 1, DIM)
        check_written_once(memory, keys, expected, is_written=failing == "second launch")
    assert "empty" not in events[events.index("launch") :]
    assert torch.equal(memory.snapshot().features, expected)
