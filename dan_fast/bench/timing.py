"""Repetitions in turn, how fast the machine multiplies, and which of the package's operators ran."""

import functools
import gc
import timeit
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dan_fast import triton_kernels
from dan_fast.bench.machine import CORES, cache_flush, why_no_triton, yardstick
from dan_fast.bench.rows import Row, Timing
from dan_fast.core.devices import synchronize
from dan_fast.core.float32 import float32_settings
from dan_fast.core.heap import heap_in_force

Say = Callable[[str], None]
# How fast a machine multiplies is said by so many products, one after the other, of square matrices with so many rows,
# and is tried so often. On a GPU to launch a small product and to wait for it takes about as long as the product.
_PRODUCTS = {"cpu": (1, 2048), "cuda": (8, 4096)}
_TRIES = 5


def once(device: torch.device, run: Callable[[], object], flush: Callable[[], None] = lambda: None) -> float:
    """Seconds of one run, the device waited for; `flush` comes before and is not timed."""
    flush()
    synchronize(device)
    # What it returns is freed within the time, as it is in use.
    return timeit.timeit(lambda: (run(), synchronize(device)), number=1)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """Operations a second of a matrix product, the best that was measured of torch's and, on a CPU, NumPy's."""
    count, rows = _PRODUCTS[device.type]
    matrices = [torch.rand(rows, rows, device=device).to(dtype) for _ in range(2)]

    def multiply() -> None:
        for _ in range(count):
            _ = matrices[0] @ matrices[1]

    products = [multiply]
    # NumPy's library takes all cores, whatever torch's number of threads is.
    if device.type == "cpu" and threads >= CORES and dtype in (torch.float32, torch.float64):
        arrays = [matrix.numpy() for matrix in matrices]
        products.append(lambda: np.matmul(*arrays))
    return count * 2 * rows**3 / min(once(device, product) for product in products for _ in range(_TRIES))


def rated_type(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """The type whose `product_rate` no network that computes in `dtype` can exceed.

    None where there is none: convolutions of float32 numbers go through the tensor cores, PyTorch's default on a GPU,
    and products of matrices do not.
    """
    settings = float32_settings(device)
    faster = settings["convolutions"] not in ("ieee", settings["matrix_products"])
    return None if dtype == torch.float32 and faster else dtype


def repetitions(seconds: float, repeat: int, budget_s: float) -> int:
    """How often something may run whose first run took `seconds`: as often as the budget allows, once at least."""
    return min(repeat, max(1, int(budget_s / max(seconds, 1e-9))))


def rounds(counts: Sequence[int]) -> Iterator[list[int]]:
    """The order of each round: repetitions in turn, so that a noisy neighbour meets all of them.

    Each round begins with another: of [2, 3] they are [0, 1], [1, 0] and [1].
    """
    for number in range(max(counts, default=0)):
        due = [index for index, count in enumerate(counts) if count > number]
        shift = number % len(due)
        yield due[shift:] + due[:shift]


def take_turns(
    device: torch.device,
    rows: Sequence[Row],
    say: Say,
    copy_bytes: int,
    dtype: torch.dtype | None = None,
    warm: bool = False,
) -> None:
    """Times the rows' calls in turn, with empty caches, and drops them.

    Args:
        rows: get the seconds and, those with calls, the machine's bandwidth and rate.
        copy_bytes: a copy of about so many bytes is timed in each round, for the `bandwidth`.
        dtype: of the arithmetic, whose `product_rate` is the `rate`; None: there is none.
        warm: call once untimed before each timed call: memory that another contender freed may have gone back to the
            system, and getting it anew takes time.
    """
    rows = [row for row in rows if row.calls]
    if not rows:
        return
    flush, (copy, moved_bytes), bandwidth = cache_flush(device), yardstick(device, copy_bytes), Timing()
    if device.type == "cpu" and heap_in_force() == "kept":
        # `peak_above` gave free pages back to the system: they are fetched before the first round.
        torch.empty(max(row.peak_bytes or 0 for row in rows), dtype=torch.uint8).zero_()
    copy()
    turns = [(row, kind, *timed) for row in rows for kind, timed in row.calls.items()]
    for number, due in enumerate(rounds([count for *_, count in turns]), start=1):
        gc.collect()
        bandwidth.append(once(device, copy, flush))
        for row, kind, call, _ in (turns[index] for index in due):
            say(f"round {number}: {row.name}")
            if warm:
                call()
            row.seconds.setdefault(kind, Timing()).append(once(device, call, flush) / row.steps)
    for row in rows:
        row.bandwidth = moved_bytes / bandwidth.median
        row.rate = product_rate(device, dtype, torch.get_num_threads()) if dtype else None
        row.calls.clear()


class Operators(TorchDispatchMode):
    """Which operators of dan_fast run, but for those whose Triton kernel cannot: a row says what it timed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dan_fast":
            name = func.name().removeprefix("dan_fast::")
            if name not in triton_kernels.__all__ or why_no_triton(args[0].device) is None:
                self.names.add(name)
        return func(*args, **(kwargs or {}))


def first_outcome(row: Row, call: Callable[[], Any], compiled: bool = False) -> Any:
    """The result that is compared; the row records which operators ran, or that it was compiled as one graph."""
    if compiled:
        counters.clear()
        outcome = call()
        breaks = sum(counters["graph_break"].values())
        row.notes.append(f"{breaks} graph breaks" if breaks else "one graph")
        return outcome
    with Operators() as operators:
        outcome = call()
    row.operators = sorted(operators.names)
    return outcome
