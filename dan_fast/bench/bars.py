"""What the kernels have to reach, and what a model predicts for a GPU nobody measured."""

import math
from typing import Any, NamedTuple

from dan_fast.bench.contenders import KERNELS, MODULE, STEP
from dan_fast.bench.problem import Size
from dan_fast.bench.results import Row, model_bytes, product_flop
from dan_fast.bench.timing import BACKWARD, FORWARD
from dan_fast.bench.verdict import Bar, at_least, at_most

# Of Table II's memory on two CPU cores, or on any GPU.
_CPU_SPEEDUP, _GPU_SPEEDUP, _IN_PLACE_SPEEDUP, _PYTORCH_SPEEDUP = 150, 100, 20, 2
_PEAK_BYTES = 100e6
_LINEAR_TO, _LINEAR_SLACK = 16, 1.25
_FLOOR_FACTOR, _STEP_SECONDS = 2.5, 4e-6


class _Gpu(NamedTuple):
    """A data sheet: bytes a second, and operations a second, on tensor cores without sparsity, added in float32."""

    name: str
    bandwidth: float
    float32: float
    tf32: float
    bfloat16: float


_GPUS = (
    _Gpu("RTX 3090", 936e9, 35.6e12, 35.6e12, 71e12),
    _Gpu("H100 SXM", 3.35e12, 66.9e12, 494.7e12, 989.4e12),
)


def check_bars(rows: list[Row], device_type: str) -> list[Bar]:
    """The bars of the memory step on this kind of device, of float32 at scale 1; rows that disagree do not count."""

    def find(use: str, scale: float = 1.0) -> Row | None:
        wanted = (KERNELS, use, "float32", scale)
        found = [row for row in rows if (row.contender, row.use, row.dtype, row.scale) == wanted]
        return found[0] if found and not found[0].disagrees else None

    bars = []

    def faster(name: str, least: float, use: str, rival: str, kind: str) -> None:
        row = find(use)
        bars.append(at_least(f"{name} ({use})", least, row.speedup.get(rival, {}).get(kind) if row else None))

    least = _CPU_SPEEDUP if device_type == "cpu" else _GPU_SPEEDUP
    for use in (STEP, MODULE):
        faster("forward + backward against literal_autograd", least, use, "literal_autograd", BACKWARD)
    if device_type != "cpu":
        row = find(MODULE)
        limit, value = math.nan, None
        if row and row.bandwidth:
            limit = _FLOOR_FACTOR * floor_seconds(row.size, row.itemsize, row.bandwidth) + _scan_seconds(row.size)
            value = row.seconds[BACKWARD].median * 1e3 if BACKWARD in row.seconds else None
        text = f"at most {limit * 1e3:.3g} ms: 2.5 x 3 (s1+s2) d bytes / copy bandwidth + 4 us x dependent steps"
        bars.append(at_most("forward + backward in ms (module)", text, limit * 1e3, value))
        return bars
    faster("forward against literal_in_place", _IN_PLACE_SPEEDUP, MODULE, "literal_in_place", FORWARD)
    for use in (STEP, MODULE):
        faster("forward + backward against the best PyTorch path", _PYTORCH_SPEEDUP, use, "best_pytorch", BACKWARD)
    for use in (STEP, MODULE):
        row = find(use)
        peak = row.peak_extra_bytes if row else None
        value = None if peak is None else peak / 1e6
        name = f"peak memory above the memories in MB ({use})"
        bars.append(at_most(name, "at most 100 MB", _PEAK_BYTES / 1e6, value))
    for use in (STEP, MODULE):
        one, many = find(use), find(use, _LINEAR_TO)
        value = None
        if one and many and BACKWARD in one.seconds and BACKWARD in many.seconds:
            per_slot = [row.seconds[BACKWARD].median / row.size.slots for row in (one, many)]
            value = per_slot[1] / per_slot[0]
        limit = f"time a slot at x {_LINEAR_TO} at most {_LINEAR_SLACK} times that at x 1"
        bars.append(at_most(f"linear in slots ({use})", limit, _LINEAR_SLACK, value))
    return bars


def floor_seconds(size: Size, itemsize: int, bandwidth: float) -> float:
    """3 (s1+s2) d bytes at `bandwidth` bytes/s: no step can be faster."""
    return model_bytes(size, itemsize, MODULE, BACKWARD) / bandwidth


def _scan_seconds(size: Size) -> float:
    return _STEP_SECONDS * 2 * size.batch


def predict(size: Size, scales: list[float]) -> dict[str, Any]:
    """The roofline model of forward + backward for GPUs by their data sheets: a prediction, nothing of it is measured.

    Example:
        >>> rows = predict(Size(), [1.0])["rows"]
        >>> [(row["dtype"], round(row["bytes_ms"], 2), round(row["operations_ms"], 2)) for row in rows[:3]]
        [('float32', 0.38, 0.23), ('float32 as tf32x3', 0.38, 0.68), ('bfloat16', 0.19, 0.34)]
    """
    rows = []
    for gpu in _GPUS:
        # Type, bytes a number, and the products that each one takes at which rate.
        forms = (
            ("float32", 4, 1, gpu.float32),
            ("float32 as tf32x3", 4, 3, gpu.tf32),
            ("bfloat16", 2, 3, gpu.bfloat16),
        )
        for name, itemsize, products, rate in forms:
            for scale in scales:
                scaled = size.scaled(scale)
                by_bytes = floor_seconds(scaled, itemsize, gpu.bandwidth)
                flop = products * product_flop(scaled, BACKWARD)
                floor = max(by_bytes, flop / rate)
                rows.append(
                    {
                        "gpu": gpu.name,
                        "dtype": name,
                        "scale": scale,
                        "bytes": model_bytes(scaled, itemsize, MODULE, BACKWARD),
                        "flop": flop,
                        "bytes_ms": by_bytes * 1e3,
                        "operations_ms": flop / rate * 1e3,
                        "floor_ms": floor * 1e3,
                        "with_scan_ms": (floor + _scan_seconds(scaled)) * 1e3,
                    }
                )
    return {
        "what": "a prediction by a model, not a measurement",
        "gpus": [gpu._asdict() for gpu in _GPUS],
        "formula": (
            "bytes: 3 (s1 + s2) d numbers at the memory's bandwidth; operations: of the products of scores, commit and "
            "backward, thrice where each takes three; with scan = the longer one + 4 us x (B + B') dependent steps"
        ),
        "rows": rows,
    }
