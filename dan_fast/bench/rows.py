"""The figures of a contender, what is computed from its times, and how a row shows them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

FORWARD, BACKWARD, WHOLE = "forward", "forward_backward", "whole"


class LeftOut(Exception):
    """Why a contender has no figures, as a line."""


class Timing(list[float]):
    """Seconds of one pass, one number for each repetition."""

    @property
    def median(self) -> float:
        return float(np.median(self))

    @property
    def quartiles(self) -> tuple[float, float]:
        return tuple(np.quantile(self, (0.25, 0.75)).tolist())

    def shown(self, unit: float = 1) -> str:
        """Median (quartiles, repetitions) in units of so many seconds."""
        median, lower, upper = (f"{seconds / unit:.4g}" for seconds in (self.median, *self.quartiles))
        return f"{median} ({lower}..{upper}, n={len(self)})"


@dataclass
class Row:
    """A contender on one problem, and its figures; `dan_fast.bench.benchmark.MEANING` says what those are.

    Attributes:
        of: what it is measured on, and the subject's own figures.
        passes: what it can do.
        name: what remarks call it, its contender unless given.
        steps: steps of a call; times are of one step.
        calls: pass -> what is going to be timed, and how often.
        left_out: why a pass was not measured.
        compared_with: what its result was compared with; None: with nothing, or it is the measure itself.
        disagrees: what differs, None if nothing does. A row that disagrees has no speed-up.
        agreement: how it agrees, in words; the largest error unless given.
        operators: the operators of dan_fast that the first call ran, none on a PyTorch path.
        model_bytes, flop: pass -> what it cannot do without: bytes moved, and operations of its products.
        bandwidth, rate: bytes and operations a second that were measured on this machine in the same run.
        speedup: other contender -> pass -> how many times as long that one takes.
    """

    contender: str
    of: dict[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] = (FORWARD, BACKWARD)
    name: str = ""
    steps: int = 1
    calls: dict[str, tuple[Callable[[], object], int]] = field(default_factory=dict)
    seconds: dict[str, Timing] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    compared_with: str | None = None
    disagrees: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    agreement: str = ""
    notes: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    returned_bytes: int = 0
    model_bytes: dict[str, int] = field(default_factory=dict)
    flop: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    rate: float | None = None
    speedup: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.name or self.contender

    @property
    def whole(self) -> Timing | None:
        """Of a contender with one pass."""
        return self.seconds.get(WHOLE)

    @property
    def extra_bytes(self) -> int | None:
        return None if self.peak_bytes is None else max(0, self.peak_bytes - self.returned_bytes)

    def ratio(self, rival: str, kind: str = WHOLE) -> float | None:
        """How many times as long the rival takes; None where that is not known."""
        return self.speedup.get(rival, {}).get(kind)

    def over(self, rival: str) -> float | None:
        """The time of a contender with one pass over the rival's."""
        ratio = self.ratio(rival)
        return ratio and 1 / ratio

    def limits(self, kind: str) -> dict[str, float]:
        """Seconds that no run of a pass can go below: by "bytes" and by "operations", where their rates are known."""
        parts = {"bytes": (self.model_bytes, self.bandwidth), "operations": (self.flop, self.rate)}
        return {name: needed[kind] / rate for name, (needed, rate) in parts.items() if rate and needed.get(kind)}

    def bandwidth_share(self, kind: str) -> float | None:
        """The limit by bytes as a share of the time measured."""
        limit = self.limits(kind).get("bytes")
        return limit / self.seconds[kind].median if limit and kind in self.seconds else None

    def over_limit(self, kind: str) -> float | None:
        """Time over the larger limit."""
        limits = self.limits(kind)
        return self.seconds[kind].median / max(limits.values()) if limits and kind in self.seconds else None

    def of_each(self, figure: Callable[[str], Any]) -> dict[str, Any]:
        """A figure of each pass that was measured."""
        return {kind: figure(kind) for kind in self.seconds}

    def leave_out(self, reason: str, *kinds: str) -> None:
        for kind in kinds or self.passes:
            self.left_out[kind] = reason
            self.calls.pop(kind, None)

    @contextmanager
    def tried(self) -> Iterator[None]:
        """A contender that cannot do what is inside is left out."""
        try:
            yield
        except LeftOut as reason:
            self.leave_out(str(reason))
        except (MemoryError, torch.OutOfMemoryError):
            self.leave_out("out of memory")

    def to_dict(self) -> dict[str, Any]:
        content = vars(self) | self.of
        del content["of"], content["calls"]
        if self.passes == (WHOLE,):
            content |= {"seconds": self.whole, "left_out": self.left_out.get(WHOLE)}
        content |= {"extra_bytes": self.extra_bytes, "bandwidth_share": self.of_each(self.bandwidth_share)}
        return content | {"limit_seconds": self.of_each(self.limits), "over_limit": self.of_each(self.over_limit)}

    def cells(self) -> dict[str, str]:
        """Column -> cell of the table, "-" for what is not known."""
        columns = {FORWARD: "forward ms", BACKWARD: "fwd + bwd ms", WHOLE: "ms"}
        times = self.of_each(lambda kind: self.seconds[kind].shown(1e-3))
        limits = self.of_each(lambda kind: max(self.limits(kind).values(), default=None))
        return {
            **{columns[kind]: times.get(kind, "-") for kind in self.passes},
            "limit ms": pair(limits, ".3g", 1e-3),
            "over limit": pair(self.of_each(self.over_limit), ".3g"),
            "extra MB": shown(self.extra_bytes, ".1f", 1e6),
            "model MB": pair(self.model_bytes, ".3g", 1e6),
            "of copy": pair(self.of_each(self.bandwidth_share), ".1%"),
            **{f"vs {rival}": pair(ratios, ".3g") for rival, ratios in self.speedup.items()},
        }

    def remarks(self) -> list[str]:
        """What is said below the table."""
        found = []
        if self.disagrees:
            found.append(f"disagrees with {self.compared_with}: {self.disagrees}; no ratio is given")
        elif self.compared_with:
            how = self.agreement
            if self.errors and not how:
                largest = max(self.errors, key=self.errors.get)
                how = f", largest difference {self.errors[largest]:.1e} ({largest})"
            found.append(f"agrees with {self.compared_with}{how}")
        for reason in dict.fromkeys(self.left_out.values()):
            kinds = [kind.replace("_", " + ") for kind, why in self.left_out.items() if why == reason]
            which = "" if kinds == [WHOLE] else f" ({', '.join(kinds)})"
            found.append(f"left out{which}: {reason}")
        if self.operators:
            found.append(f"operators {', '.join(self.operators)}")
        if self.compile_seconds is not None:
            found.append(f"compiled in {self.compile_seconds:.1f} s, not counted")
        return found + self.notes


def plain(value: Any) -> Any:
    """A value as JSON has it: named tuples by name, types and devices as words."""
    if isinstance(value, Timing):
        lower, upper = value.quartiles
        return {"median": value.median, "q1": lower, "q3": upper, "repeats": len(value), "all": list(value)}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def shown(value: float | None, form: str, unit: float = 1) -> str:
    """A number in units; "-" for None."""
    return "-" if value is None else format(value / unit, form)


def pair(values: Mapping[str, float | None], form: str, unit: float = 1) -> str:
    """Forward / forward + backward, a "-" where only the other was measured; or the value of the only pass."""
    kinds = (WHOLE,) if WHOLE in values else (FORWARD, BACKWARD)
    cells = [shown(values.get(kind), form, unit) for kind in kinds]
    return "-" if set(cells) == {"-"} else " / ".join(cells)
