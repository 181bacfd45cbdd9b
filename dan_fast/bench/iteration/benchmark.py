"""`dan-fast bench iteration`: whole training iterations beside plain ResNet's, Table VIII."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch.utils.flop_counter import FlopCounterMode

from dan_fast.bench.benchmark import Bar, Benchmark, at_most, contenders_of, one_of
from dan_fast.bench.iteration import contenders
from dan_fast.bench.iteration.contenders import FROZEN, TOLERANCES, UPDATED, DANIteration, IterationSize
from dan_fast.bench.iteration.profile import Profile, in_order
from dan_fast.bench.machine import peak_above
from dan_fast.bench.memory import benchmark as memory
from dan_fast.bench.memory.contenders import LITERAL as LITERAL_STEPS
from dan_fast.bench.memory.contenders import STEP, Contender
from dan_fast.bench.memory.problem import MODULE, Size, model_bytes, product_flop
from dan_fast.bench.rows import BACKWARD, WHOLE, LeftOut, Row, Timing, shown
from dan_fast.bench.timing import Operators, Say, rated_type, repetitions, take_turns
from dan_fast.core.errors import DanFastError
from dan_fast.core.free_memory import why_too_large
from dan_fast.training.config import Precision

PLAIN, LITERAL, DAN = CONTENDERS = ("plain", "literal", "dan")
_LITERAL_STEP = Contender(LITERAL_STEPS, STEP)
# Of an epoch, Table VIII: ResNet-50, and DAN.
PAPER_SECONDS = {"plain": 32.609, "dan": 137.908}
PAPER_RATIO = PAPER_SECONDS["dan"] / PAPER_SECONDS["plain"]
EPOCH_IMAGES = 12_936
_CPU_RATIO, _GPU_RATIO = 1.20, 1.15
# S and S~ each need a labelled and an unlabelled image, and batch norm two of a map of one position.
FEWEST_IMAGES = 8
# The literal operators and the package's are compared on so many images and slots.
_CHECK = {"images": 8, "labeled_slots": 120, "unlabeled_slots": 80}


def row_of(contender: str, order: int | None, backbone: str, images: int, **figures: Any) -> Row:
    """The row of a kind of iteration; its order is None for PLAIN."""
    of = {"order": order, "backbone": backbone, "images": images, "gflop": None}
    of |= {"rounding": {}, "allowed": {}, "profile": {}, "round_ratios": []}
    name = contender if order is None else f"{contender}, order {order}, {backbone}"
    return Row(contender, of, (WHOLE,), name, **figures)


@dataclass(kw_only=True)
class IterationBenchmark(Benchmark):
    """Time whole training iterations beside those of plain ResNet, Table VIII, after checking the gradients.

    Args:
        backbone: torchvision ResNet (the paper: resnet50).
        height: Rows of an image in pixels (the paper: 224).
        width: Columns of an image in pixels (the paper: 224).
        images: Images per iteration, S and S~ together (the paper: 64).
        order: Orders of the meta gradients, separated by commas: 1, 2.
        contenders: Some of plain, literal and dan, separated by commas; or all.
        precision: float32, or bfloat16 autocast for the network.
        labeled_slots: Slots of M, all of them filled (the paper: 9000).
        unlabeled_slots: Slots of M', all of them filled (the paper: 5500).
        classes: Persons of the classifier (Market-1501: 751).
        budget_s: Seconds that all repetitions of a contender may take together; a literal iteration is left out if a
            single repetition would take longer.
    """

    name: ClassVar[str] = "iteration"
    columns: ClassVar[tuple[str, ...]] = ("order", "backbone")
    against: ClassVar[tuple[str, ...]] = (PLAIN,)
    meaning: ClassVar[dict[str, str]] = {
        "plain": "the backbone with a linear classifier: forward, cross-entropy, backward and SGD step on these images",
        "literal": "DAN in the same step with reference.memory_step and reference.attention_head, order 1",
        "dan": "DAN with this package, the trainer's own meta step from the batch on the host to the optimizer's step",
        "updated": "the attention branch wins: backbone, classifier and gates are updated",
        "frozen": "the adversary branch wins: NL-CBAM, CAM weight and gates are updated",
        "seconds": "an iteration; images are drawn, not decoded; repetitions of the contenders in turn",
        "epoch_seconds": f"for {EPOCH_IMAGES} images, those of Market-1501's training set",
        "gflop": "1e9 operations of an iteration by torch.utils.flop_counter, products and convolutions only; those "
        "inside the package's compiled operators are not counted",
        "model_bytes": "a model: the images and, where the backbone is updated, eight passes over the parameters: read "
        "forward and backward, gradients written and read, weights and momentum read and written by the step; of dan "
        "also its two memory steps; activations are not in it",
        "flop": "gflop, and of dan its two memory steps",
        "errors": "distance of the gradients an iteration would follow from those with the literal operators, as a "
        "share of their norm, on few images and slots in the same run, with S~ at the same weights",
        "rounding": "the same between literal gradients with and without the last bit of the last feature map changed",
        "allowed": "the largest error that is no disagreement: tolerance, or 4 times rounding where that is more",
        "ratio": "median over the median of plain; round_ratios: round by round; none without agreement",
        "paper_ratio": "Table VIII: 137.908 s an epoch against 32.609 s",
        "profile": "seconds of one iteration, the device is waited for at every mark; forward: of the network's parts, "
        "losses is the rest of the pass; backward: memory and head are from the gradient of their results to that of "
        "their inputs, backbone what follows the gradient of the last map, losses the rest; S again: with order 2, the "
        "backbone with tangents and the second derivatives of what follows it; rest is everything outside of passes "
        "and optimizer: batch, competition, finite checks, inner step, sums of gradients",
    }

    backbone: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    height: PositiveInt = 224
    width: PositiveInt = 224
    images: PositiveInt = 64
    order: str = "1,2"
    contenders: str = "all"
    precision: Precision = "float32"
    labeled_slots: PositiveInt = 9000
    unlabeled_slots: PositiveInt = 5500
    classes: PositiveInt = 751
    repeat: PositiveInt = 5
    budget_s: PositiveFloat = 300.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.order = [int(word) for word in one_of("order", self.order, ("1", "2"))]
        self.contenders = contenders_of(self.contenders, CONTENDERS)
        if self.images < FEWEST_IMAGES:
            raise DanFastError(f"images: {self.images} are too few: S and S~ need {FEWEST_IMAGES} together, or more.")
        if self.classes < 2:
            raise DanFastError(f"classes: {self.classes} is too few: a classifier needs 2 persons or more.")
        self.size = IterationSize(*(getattr(self, name) for name in IterationSize._fields))

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        kinds = [(PLAIN, None, UPDATED), (LITERAL, 1, UPDATED)]
        kinds += [(DAN, order, backbone) for order in self.order for backbone in (UPDATED, FROZEN)]
        rows = [row_of(*kind, self.images) for kind in kinds if kind[0] in self.contenders]
        if DAN in self.contenders:
            self._compare([row for row in rows if row.contender == DAN], say)
        say("making the networks and memories")
        dan = DANIteration(self.size, self.place, self.precision)
        plain = contenders.plain_iteration(self.size, dan) if PLAIN in self.contenders else None
        for row in rows:
            say(f"first runs: {row.name}")
            with row.tried():
                self._first_runs(row, dan, plain)
        bytes_moved = max(row.model_bytes.get(WHOLE, 0) for row in rows)
        take_turns(self.place, rows, say, bytes_moved, rated_type(self.place, getattr(torch, self.precision)))
        images = f"{self.images} images of {self.height} x {self.width}, {self.precision}"
        slots = f"{self.labeled_slots} and {self.unlabeled_slots} slots"
        yield f"{self.backbone}, {images}, {slots}: one training iteration", rows

    def _compare(self, rows: list[Row], say: Say) -> None:
        """The gradients that an iteration would follow, with the package's operators and with the literal ones."""
        few = {name: min(value, getattr(self.size, name)) for name, value in _CHECK.items()}
        dan = DANIteration(self.size._replace(**few), self.place, self.precision)
        for row in rows:
            say(f"comparing with the literal operators: {row.name}")
            dan.set(row.of["order"], row.of["backbone"])
            found = contenders.compare_iteration(dan, TOLERANCES[self.precision])
            row.compared_with, (row.disagrees, row.errors, rounding, allowed) = "the literal operators", found
            row.of |= {"rounding": rounding, "allowed": allowed}
            if row.errors:
                group = max(row.errors, key=row.errors.get)
                row.agreement = (
                    f", largest difference {row.errors[group]:.1e} in {group}, "
                    f"what rounding alone does {rounding[group]:.1e}, allowed {allowed[group]:.1e}"
                )

    def _first_runs(self, row: Row, dan: DANIteration, plain: Callable | None) -> None:
        """The operations of an iteration, its memory, where its time goes, and how often there is time for it."""
        slots = Size(self.labeled_slots, self.unlabeled_slots, dan.model.network.key_dim, max(1, self.images // 4))
        if row.contender == LITERAL and (reason := self._too_costly(slots)):
            raise LeftOut(reason)

        def iterate() -> object:
            if row.contender == PLAIN:
                return plain()
            dan.set(row.of["order"], row.of["backbone"])
            with contenders.literal_operators(dan.model) if row.contender == LITERAL else nullcontext():
                return dan.run()

        with FlopCounterMode(display=False) as counter, Operators() as found:
            iterate()
        flop = counter.get_total_flops()
        row.operators, row.of["gflop"] = sorted(found.names), flop / 1e9
        count = sum(parameter.numel() for parameter in dan.model.network.parameters())
        moved = 3 * self.images * self.height * self.width + count * (8 if row.of["backbone"] == UPDATED else 1)
        moved *= 4
        if row.contender == DAN:
            moved += 2 * model_bytes(slots, 4, MODULE, BACKWARD)
            flop += 2 * product_flop(slots, BACKWARD)
        row.model_bytes, row.flop = {WHOLE: moved}, {WHOLE: flop}
        start = time.perf_counter()
        _, row.peak_bytes = peak_above(self.place, iterate)
        seconds = time.perf_counter() - start
        if row.contender == DAN:
            profile = Profile(dan.step)
            with profile.recording():
                iterate()
            row.of["profile"] = dict(profile.seconds)
        row.calls = {WHOLE: (iterate, repetitions(seconds, self.repeat, self.budget_s))}

    def _too_costly(self, slots: Size) -> str | None:
        """Why a literal iteration is left out: its two memory steps are foreseen from steps with few slots."""
        seconds, needed = (2 * x for x in memory.foresee(_LITERAL_STEP, slots, torch.float32, self.place))
        if seconds > self.budget_s:
            return f"its memory steps alone would take about {seconds:.0f} s, the budget is {self.budget_s:.0f} s"
        return why_too_large(self.place, needed, "its memory steps")

    def set_ratios(self, rows: Sequence[Row]) -> None:
        """Also round by round."""
        super().set_ratios(rows)
        for row in rows:
            pairs = zip(row.whole, rows[0].whole, strict=False) if row.over(PLAIN) else ()
            row.of["round_ratios"] = [own / plain for own, plain in pairs]

    def figures(self, row: Row) -> dict[str, Any]:
        seconds, gflop = row.whole and row.whole.median, row.of["gflop"]
        return {
            # How it is said here: how many times as long this one takes.
            "ratio": row.over(PLAIN),
            "speedup": {},
            "images_per_second": seconds and self.images / seconds,
            "epoch_seconds": seconds and EPOCH_IMAGES / self.images * seconds,
            "gflop_per_second": seconds and gflop and gflop / seconds,
        }

    def cells(self, row: Row) -> dict[str, str]:
        figures, by_round = self.figures(row), Timing(row.of["round_ratios"])
        return {
            "images/s": shown(figures["images_per_second"], ".1f"),
            "s/epoch": shown(figures["epoch_seconds"], ".1f"),
            "GFLOP": shown(row.of["gflop"], ".1f"),
            "GFLOP/s": shown(figures["gflop_per_second"], ".1f"),
            "over plain": shown(figures["ratio"], ".3f"),
            f"vs {PLAIN}": "-",
            "by round": "{:.3f}..{:.3f}".format(*by_round.quartiles) if by_round else "-",
        }

    def legend(self) -> list[str]:
        paper = f"The paper's DAN takes {PAPER_RATIO:.2f} times as long as its ResNet-50 (Table VIII)."
        return [*super().legend(), f"s/epoch: for {EPOCH_IMAGES} images. {paper}"]

    def more_tables(self, rows: Sequence[Row]) -> dict[str, list[dict[str, str]]]:
        table: dict[str, dict[str, str]] = {}
        for row in (row for row in rows if row.of["profile"]):
            profile = row.of["profile"] | {"sum": sum(row.of["profile"].values())}
            for part, seconds in profile.items():
                cells = table.setdefault(part, {"part": part})
                cells[f"order {row.of['order']}, {row.of['backbone']}"] = shown(seconds, ".1f", 1e-3)
        parts = [table[part] for part in sorted(table, key=in_order)]
        return {"Where the time of one iteration goes, ms": parts} if parts else {}

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"tolerance": TOLERANCES[self.precision], "paper_ratio": PAPER_RATIO}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """DAN of order 1 that updates the backbone, against plain ResNet."""
        row = next((r for r in rows if (r.contender, r.of["order"], r.of["backbone"]) == (DAN, 1, UPDATED)), None)
        name = f"order 1, backbone updated, over plain {self.backbone} ({self.precision}, {self.images} images)"
        value = row and row.over(PLAIN)
        if self.place.type == "cpu":
            return [at_most(name, _CPU_RATIO, value)]
        return [at_most(name, _GPU_RATIO, value if self.precision == "bfloat16" else None, "times in bfloat16")]
