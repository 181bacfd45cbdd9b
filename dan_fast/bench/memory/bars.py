"""Models of a memory step's bytes and operations, what the kernels have to reach, and a prediction for GPUs."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from dan_fast.bench.benchmark import Bar, at_least, at_most
from dan_fast.bench.memory.contenders import IN_PLACE, KERNELS, LITERAL, MODULE, STEP
from dan_fast.bench.memory.problem import Size
from dan_fast.bench.rows import BACKWARD, FORWARD, Row

BEST_PYTORCH = "best_pytorch"
# Of Table II's memory on two CPU cores, or on any GPU.
_CPU_SPEEDUP, _GPU_SPEEDUP, _IN_PLACE_SPEEDUP, _PYTORCH_SPEEDUP = 150, 100, 20, 2
_PEAK_MEGABYTES = 100
_LINEAR_TO, _LINEAR_SLACK = 16, 1.25
_FLOOR_FACTOR, _STEP_SECONDS = 2.5, 4e-6
# Data sheets: bytes a second, and operations a second on tensor cores without sparsity, added in float32.
_GPUS = (
    {"name": "RTX 3090", "bandwidth": 936e9, "float32": 35.6e12, "tf32": 35.6e12, "bfloat16": 71e12},
    {"name": "H100 SXM", "bandwidth": 3.35e12, "float32": 66.9e12, "tf32": 494.7e12, "bfloat16": 989.4e12},
)


def model_bytes(size: Size, itemsize: int, use: str, kind: str) -> int:
    """The bytes a step cannot do without, a model: passes over both memories of s1 + s2 rows of d numbers.

    A memory that keeps its state is read and written once, by commit and scores in one pass, and read once more by
    the backward. A pure step reads it for the scores, reads and writes it for the new state.
    """
    passes = (2 if use == MODULE else 3) + (kind == BACKWARD)
    return passes * size.slots * size.key_dim * itemsize


def product_flop(size: Size, kind: str) -> int:
    """Operations of the products in score space: scores, the commit of the writes, and the backward's product."""
    scores = 2 * size.batch * (2 * size.labeled_slots + size.unlabeled_slots) * size.key_dim
    commit = 2 * size.batch * size.slots * size.key_dim
    return scores * (2 if kind == BACKWARD else 1) + commit


def _scan_seconds(size: Size) -> float:
    return _STEP_SECONDS * 2 * size.batch


def memory_bars(rows: Sequence[Row], device_type: str) -> list[Bar]:
    """The bars of the memory step on this kind of device, of float32 at scale 1; rows that disagree do not count."""
    found = {
        (row.of["use"], row.of["scale"]): row
        for row in rows
        if row.contender == KERNELS and row.of["dtype"] == "float32" and not row.disagrees
    }
    # One that was not measured has no figures.
    both = _, module = [found.get((use, 1), Row(KERNELS, {"use": use})) for use in (STEP, MODULE)]
    on_cpu, name = device_type == "cpu", "forward + backward"

    def faster(rival: str, words: str, least: float) -> list[Bar]:
        of = ((f"{name} against {words} ({row.of['use']})", row.ratio(rival, BACKWARD)) for row in both)
        return [at_least(name, least, ratio) for name, ratio in of]

    bars = faster(LITERAL, LITERAL, _CPU_SPEEDUP if on_cpu else _GPU_SPEEDUP)
    if not on_cpu:
        limit, value = math.nan, None
        if module.bandwidth:
            limit = (_FLOOR_FACTOR * module.limits(BACKWARD)["bytes"] + _scan_seconds(module.of["size"])) * 1e3
            value = module.seconds[BACKWARD].median * 1e3 if BACKWARD in module.seconds else None
        text = f"at most {limit:.3g} ms: 2.5 x 3 (s1+s2) d bytes / copy bandwidth + 4 us x dependent steps"
        return [*bars, at_most(f"{name} in ms (module)", limit, value, limit=text)]
    in_place = module.ratio(IN_PLACE, FORWARD)
    bars.append(at_least(f"forward against {IN_PLACE} (module)", _IN_PLACE_SPEEDUP, in_place))
    bars += faster(BEST_PYTORCH, "the best PyTorch path", _PYTORCH_SPEEDUP)
    for row in both:
        value = row.extra_bytes and row.extra_bytes / 1e6
        bars.append(at_most(f"peak memory above the memories in MB ({row.of['use']})", _PEAK_MEGABYTES, value, "MB"))
    for row in both:
        larger, value = found.get((row.of["use"], _LINEAR_TO)), None
        if larger and all(BACKWARD in each.seconds for each in (row, larger)):
            small, large = (each.seconds[BACKWARD].median / each.of["size"].slots for each in (row, larger))
            value = large / small
        limit = f"time a slot at x {_LINEAR_TO} at most {_LINEAR_SLACK} times that at x 1"
        bars.append(at_most(f"linear in slots ({row.of['use']})", _LINEAR_SLACK, value, limit=limit))
    return bars


def predict(size: Size, scales: Sequence[float]) -> dict[str, Any]:
    """The roofline model of forward + backward for GPUs by their data sheets; nothing of it is measured."""
    rows = []
    # Type, bytes a number, the products that each one takes, and at which rate.
    forms = (("float32", 4, 1, "float32"), ("float32 as tf32x3", 4, 3, "tf32"), ("bfloat16", 2, 3, "bfloat16"))
    for gpu, (name, itemsize, products, rate), scale in itertools.product(_GPUS, forms, scales):
        scaled = size.scaled(scale)
        moved = model_bytes(scaled, itemsize, MODULE, BACKWARD)
        flop = products * product_flop(scaled, BACKWARD)
        figures = {"bytes_ms": moved / gpu["bandwidth"] * 1e3, "operations_ms": flop / gpu[rate] * 1e3}
        floor = max(figures.values())
        figures |= {"floor_ms": floor, "with_scan_ms": floor + _scan_seconds(scaled) * 1e3}
        problem = {"gpu": gpu["name"], "dtype": name, "scale": scale, "bytes": moved, "flop": flop}
        rows.append(problem | figures)
    return {
        "what": "a prediction by a model, not a measurement",
        "gpus": _GPUS,
        "formula": (
            "bytes: 3 (s1 + s2) d numbers at the memory's bandwidth; operations: of the products of scores, commit and "
            "backward, thrice where each takes three; with scan = the longer one + 4 us x (B + B') dependent steps"
        ),
        "rows": rows,
    }
