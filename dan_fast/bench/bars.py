"""What the kernels have to reach, and what a model predicts for a GPU nobody measured."""

import math
from typing import Any

from dan_fast.bench.contenders import KERNELS, MODULE, STEP
from dan_fast.bench.problem import Size
from dan_fast.bench.results import Row, model_bytes
from dan_fast.bench.timing import BACKWARD, FORWARD
from dan_fast.bench.verdict import Bar, at_least, at_most

# Of Table II's memory on two CPU cores, or on any GPU.
_CPU_SPEEDUP, _GPU_SPEEDUP, _IN_PLACE_SPEEDUP, _PYTORCH_SPEEDUP = 150, 100, 20, 2
_PEAK_BYTES = 100e6
_LINEAR_TO, _LINEAR_SLACK = 16, 1.25
_FLOOR_FACTOR, _STEP_SECONDS = 2.5, 4e-6
# An RTX 3090's memory, from its data sheet.
_RTX_3090 = 936e9


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
    """The roofline model of forward + backward for an RTX 3090: a prediction, nothing of it is measured.

    Example:
        >>> [round(row["floor_ms"], 2) for row in predict(Size(), [1.0])["rows"]]
        [0.38, 0.19]
    """
    rows = []
    for name, itemsize in (("float32", 4), ("bfloat16", 2)):
        for scale in scales:
            scaled = size.scaled(scale)
            floor = floor_seconds(scaled, itemsize, _RTX_3090)
            rows.append(
                {
                    "dtype": name,
                    "scale": scale,
                    "bytes": model_bytes(scaled, itemsize, MODULE, BACKWARD),
                    "floor_ms": floor * 1e3,
                    "with_scan_ms": (floor + _scan_seconds(scaled)) * 1e3,
                }
            )
    return {
        "what": "a prediction by a model, not a measurement",
        "gpu": "RTX 3090, 936 GB/s",
        "formula": "floor = 3 (s1 + s2) d bytes / 936 GB/s; with scan = floor + 4 us x (B + B') dependent steps",
        "rows": rows,
    }
