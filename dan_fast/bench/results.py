"""The figures of a benchmark: what a row holds, and what is computed from its times."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dan_fast.bench.contenders import KERNELS, MODULE
from dan_fast.bench.problem import Size
from dan_fast.bench.timing import BACKWARD, FORWARD, Timing


@dataclass
class Row:
    """A contender in one use, at one size and dtype.

    Attributes:
        scale: slots as a multiple of the size the run was asked for.
        seconds: "forward" and "forward_backward", as far as measured; a step.
        left_out: for each pass that was not measured, why.
        compared_with: the contender whose result this one's was compared with; None: it is the measure itself.
        disagrees: what differs, None if nothing does. A row that disagrees has no speed-up.
        errors: the largest relative difference of each result.
        operators: the operators of dan_fast that the first step called, none on a PyTorch path.
        compile_seconds: of the first calls, which are in no other figure.
        peak_bytes: how far memory rose above where it stood before the run.
        returned_bytes: how much of that is the new memories a pure step returns.
        bandwidth: bytes a second that a copy reads and writes.
        float32_rate: operations a second of a GPU that multiplies this row's numbers in float32.
        speedup: other contender -> pass -> how many times as long that one takes.
    """

    contender: str
    use: str
    dtype: str
    itemsize: int
    scale: float
    size: Size
    steps: int = 1
    seconds: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    compared_with: str | None = None
    disagrees: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    returned_bytes: int = 0
    bandwidth: float | None = None
    float32_rate: float | None = None
    speedup: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def peak_extra_bytes(self) -> int | None:
        return None if self.peak_bytes is None else max(0, self.peak_bytes - self.returned_bytes)

    def bandwidth_share(self, kind: str) -> float | None:
        """Time that the model's bytes take at the copy bandwidth, as a share of the time measured."""
        if kind not in self.seconds or not self.bandwidth:
            return None
        return self.floors(kind)["bytes"] / self.seconds[kind].median

    def floors(self, kind: str) -> dict[str, float]:
        """Seconds that no run of this pass can go below: "bytes", and "operations" where their rate is known."""
        floors = {}
        if self.bandwidth:
            floors["bytes"] = model_bytes(self.size, self.itemsize, self.use, kind) / self.bandwidth
        if self.float32_rate:
            floors["operations"] = product_flop(self.size, kind) / self.float32_rate
        return floors

    def gflops(self, kind: str) -> float | None:
        # The literal loops make other products, sample by sample.
        if kind not in self.seconds or self.contender.startswith("literal"):
            return None
        return product_flop(self.size, kind) / self.seconds[kind].median / 1e9

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        content["size"] = self.size._asdict()
        content["seconds"] = {kind: timing.to_dict() for kind, timing in self.seconds.items()}
        content["peak_extra_bytes"] = self.peak_extra_bytes
        content["model_bytes"] = {k: model_bytes(self.size, self.itemsize, self.use, k) for k in (FORWARD, BACKWARD)}
        content["bandwidth_share"] = {kind: self.bandwidth_share(kind) for kind in self.seconds}
        content["floor_seconds"] = {kind: self.floors(kind) for kind in self.seconds}
        content["gflops"] = {kind: self.gflops(kind) for kind in self.seconds}
        return content


def model_bytes(size: Size, itemsize: int, use: str, kind: str) -> int:
    """The bytes a step cannot do without, a model: passes over both memories of s1 + s2 rows of d numbers.

    A memory that keeps its state is read and written once, by commit and scores in one pass, and read once more by
    the backward. A pure step reads it for the scores, reads and writes it for the new state.

    Example:
        >>> model_bytes(Size(), 4, "module", "forward_backward") / 1e6
        355.83
    """
    passes = (2 if use == MODULE else 3) + (kind == BACKWARD)
    return passes * size.slots * size.key_dim * itemsize


def product_flop(size: Size, kind: str) -> int:
    """Operations of the products in score space: scores, the commit of the writes, and the backward's product."""
    scores = 2 * size.batch * (2 * size.labeled_slots + size.unlabeled_slots) * size.key_dim
    commit = 2 * size.batch * size.slots * size.key_dim
    return scores * (2 if kind == BACKWARD else 1) + commit


def set_speedups(rows: list[Row]) -> None:
    """Ratios of medians between the rows of one size and dtype; none with a row that disagrees.

    Against literal_autograd and literal_in_place, and against the faster of the PyTorch paths in the same use.
    """

    def measured(name: str, use: str | None = None) -> list[Row]:
        return [r for r in rows if r.contender == name and use in (None, r.use) and r.seconds and not r.disagrees]

    for row in rows:
        row.speedup = {}
        if row.disagrees or not row.seconds:
            continue
        rivals = {name: measured(name) for name in ("literal_autograd", "literal_in_place")}
        if row.contender == KERNELS:
            rivals["best_pytorch"] = measured("score_space", row.use) + measured("score_space_compiled", row.use)
        for name, others in rivals.items():
            for kind, timing in row.seconds.items():
                times = [other.seconds[kind].median for other in others if kind in other.seconds and other is not row]
                if times:
                    row.speedup.setdefault(name, {})[kind] = min(times) / timing.median
