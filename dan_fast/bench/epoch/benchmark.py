"""`dan-fast bench epoch`: an epoch from files on disk, Table VIII."""

import functools
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt

from dan_fast.bench.benchmark import LEGEND, Bar, Benchmark, at_most, one_of, sizes_of
from dan_fast.bench.epoch import contenders
from dan_fast.bench.epoch.contenders import CACHED, PLAIN, PLAIN_RECIPE, Epoch
from dan_fast.bench.iteration.benchmark import EPOCH_IMAGES, FEWEST_IMAGES, PAPER_SECONDS
from dan_fast.bench.machine import CORES, yardstick
from dan_fast.bench.process import in_own_process
from dan_fast.bench.rows import WHOLE, Row, Timing, shown
from dan_fast.bench.timing import Say, once, product_rate, rated_type, rounds
from dan_fast.core.errors import DanFastError
from dan_fast.nn import BACKBONES
from dan_fast.nn.backbones.timm import PREFIX
from dan_fast.training.recipes import recipe_settings

_RATIO = 1.05
_COPIES = 5
_PAPER = "paper"


@dataclass(kw_only=True)
class EpochBenchmark(Benchmark):
    """Time an epoch from JPEG files: a plain PyTorch loop, the same from the cache, and DAN as the trainer runs it.

    Args:
        files: Height and width of the images, as files and in the network, separated by commas.
        backbone: Backbones, separated by commas: torchvision ResNets, or timm:NAME.
        recipe: Recipes of DAN, separated by commas: paper, which Table VIII times, or dan, without instance norm like
            the plain loop.
        order: Orders of the meta gradients, separated by commas: 1, 2; for recipes that take meta steps.
        images: Images per epoch (Market-1501's training set: 12936); that many are drawn, or a few more.
        iterations: Mini-batches that are measured, from which the epoch is extrapolated; 0 measures all of them.
        batch: Images per mini-batch (the paper: 64).
        workers: Processes of the plain DataLoader; by default as many as there are cores.
        folder: Folder for the images and the cache, which later runs use again; by default a folder that is removed at
            the end.
    """

    name: ClassVar[str] = "epoch"
    columns: ClassVar[tuple[str, ...]] = ("order",)
    against: ClassVar[tuple[str, ...]] = (PLAIN, CACHED)
    meaning: ClassVar[dict[str, str]] = {
        "plain": "a plain PyTorch loop fed by torch's DataLoader: backbone, linear classifier, cross-entropy, SGD",
        "cached": "the same loop on the same mini-batches, fed by dan_fast from its cache of decoded images",
        "paper, dan": "the trainer's own feed from the cache, meta step and scalars with the recipe of that name; the "
        "memories are full, and the attention branch wins, so that the backbone is updated; no checkpoint is written",
        "seconds": "of an epoch: those of measured_iterations times epoch_iterations / measured_iterations; two "
        "mini-batches of an earlier pass and, where the epoch is extrapolated, the first two of the same pass are not "
        "timed, so that the start of workers counts in whole epochs alone",
        "extrapolated": "whether fewer mini-batches were measured than an epoch has",
        "images": "files of an epoch, drawn by dan_fast.data.synthetic, half of each domain; plain and cached see all "
        "with labels, recipes one domain without; every mini-batch has as many images",
        "waiting_share": "of the time, in which the loop waited for the next mini-batch",
        "cpu_seconds": "user and system, of the loop's process and the workers', extrapolated like seconds",
        "peak_bytes": "of a process of its own, from its start to its end",
        "ratio": "median over the median of plain and of cached; none without agreement",
        "flop": "of products and convolutions, by torch.utils.flop_counter, without those in compiled operators",
        "model_bytes": "a model: pixels read as uint8 and written as float32",
        "agreement": "images of two mini-batches with those of plain's DataLoader on the same draws, decoded bit for "
        "bit, augmented as `bench data` has it; of cached also the losses of the first steps; that DAN's gradients are "
        "the literal ones is what `bench iteration` compares",
        "paper_seconds": "Table VIII, on the authors' machine",
        "build_seconds": "to fill the cache, once, in no other figure; nearly 0 where an earlier run has filled it",
    }

    files: str = "128x64,256x128"
    backbone: str = "resnet50,resnet18,timm:efficientnet_lite0"
    recipe: str = _PAPER
    order: str = "1,2"
    images: PositiveInt = EPOCH_IMAGES
    iterations: NonNegativeInt = 0
    batch: PositiveInt = 64
    workers: NonNegativeInt = CORES
    repeat: PositiveInt = 1
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.files = sizes_of(self.files)
        self.recipe = one_of("recipe", self.recipe, (_PAPER, "dan"))
        self.order = [int(word) for word in one_of("order", self.order, ("1", "2"))]
        self.backbone = [word.strip() for word in self.backbone.split(",")]
        for word in self.backbone:
            if not word.startswith(PREFIX):
                one_of("backbone", word, (*BACKBONES, f"{PREFIX}NAME"))
        self.images = contenders.drawn_images(self.images)
        if not FEWEST_IMAGES <= self.batch <= self.images:
            raise DanFastError(f"batch is {self.batch}; it must be from {FEWEST_IMAGES} to images, {self.images}.")
        self._epoch_iterations = self.images // self.batch
        self._measured = min(self.iterations or self._epoch_iterations, self._epoch_iterations)
        self._scale = self._epoch_iterations / self._measured

    @property
    def peak_meaning(self) -> str:
        if self.place.type == "cuda":
            return "torch.cuda.max_memory_allocated of the contender's own process; tensors only"
        return (
            "highest resident memory of the contender's own process (VmHWM), libraries and what is mapped of the cache "
            "included, workers not"
        )

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        extrapolated = self._measured < self._epoch_iterations
        how = f"mini-batches of {self.batch}, {self.workers} workers of plain; recipe {', '.join(self.recipe)}"
        if extrapolated:
            how += f"; measured: {self._measured} of {self._epoch_iterations} mini-batches, EXTRAPOLATED to the epoch"
        with TemporaryDirectory(prefix="dan-fast-bench-") as removed:
            root = Path(self.folder or removed)
            for height, width in self.files:
                folder = contenders.draw_files(
                    root, (height, width), self.images, lambda done, total: say(f"drawing images, {done} of {total}")
                )
                for backbone in self.backbone:
                    sizes = (height, width, self.batch, self._measured, self.workers)
                    cache, device = str(root / "cache"), str(self.place)
                    epoch = Epoch(str(folder), cache, backbone, *sizes, device, untimed=2 if extrapolated else 0)
                    title = f"{backbone}, {self.images} JPEG files of {height} x {width}, {how}"
                    yield title, self._group(epoch, say)

    def _group(self, epoch: Epoch, say: Say) -> list[Row]:
        """All contenders with one backbone on files of one size."""
        kinds: list[tuple[str, int | None]] = [(PLAIN, None), (CACHED, None)]
        for recipe in self.recipe:
            meta_steps = recipe_settings(recipe)["meta"]["procedure"] != "daml1"
            kinds += [(recipe, order) for order in (self.order if meta_steps else [None])]
        of = {"backbone": epoch.backbone, "image_size": [epoch.height, epoch.width], "images": self.images}
        of |= {"epoch_iterations": self._epoch_iterations, "measured_iterations": self._measured}
        of |= {"extrapolated": self._measured < self._epoch_iterations, "build_seconds": None}
        moved = {WHOLE: self._epoch_iterations * self.batch * 3 * epoch.height * epoch.width * (1 + 4)}
        rows = []
        for contender, order in kinds:
            name = contender if order is None else f"{contender}, order {order}"
            rows.append(Row(contender, of | {"order": order, "passes": []}, (WHOLE,), name, model_bytes=moved))
        # Once a recipe: it leaves the cache full.
        compared = functools.cache(functools.partial(in_own_process, contenders.compare_feeds, epoch=epoch))
        for row in rows[1:]:
            say(f"{epoch.backbone}: {row.name} is compared")
            with row.tried():
                found = compared(recipe=PLAIN_RECIPE if row.contender == CACHED else row.contender)
                row.disagrees, words, row.of["build_seconds"] = found
                row.compared_with, row.agreement = "plain's DataLoader", f": {words}"
        losses: dict[str, list[float]] = {}
        for due in rounds([self.repeat] * len(rows)):
            for row in (rows[index] for index in due if not rows[index].left_out):
                say(f"{epoch.backbone}, {epoch.height}x{epoch.width}: {row.name}")
                request = {"contender": row.contender, "order": row.of["order"], "epoch": epoch}
                with row.tried():
                    found = in_own_process(contenders.measure, **request)
                    losses.setdefault(row.contender, found.pop("losses"))
                    row.of["passes"].append(found)
                    row.seconds.setdefault(WHOLE, Timing()).append(found["seconds"] * self._scale)
                    row.flop = {WHOLE: found["flop"] * self._epoch_iterations}
                    row.peak_bytes = max(each["peak_bytes"] or 0 for each in row.of["passes"]) or None
        if losses.keys() >= {PLAIN, CACHED} and not rows[1].disagrees:
            rows[1].disagrees, words = contenders.compare_losses(losses[CACHED], losses[PLAIN])
            rows[1].agreement += f", {words}"
        self._measure_machine(rows)
        return rows

    def _measure_machine(self, rows: Sequence[Row]) -> None:
        copy, moved_bytes = yardstick(self.place, sys.maxsize)
        seconds = Timing([once(self.place, copy) for _ in range(1 + _COPIES)][1:])
        rated = rated_type(self.place, torch.float32)
        rate = product_rate(self.place, rated, torch.get_num_threads()) if rated else None
        for row in rows:
            row.bandwidth, row.rate = moved_bytes / seconds.median, rate

    def figures(self, row: Row) -> dict[str, Any]:
        seconds = row.whole and row.whole.median
        passes, waiting, cpu = row.of["passes"], None, None
        if passes:
            waiting = statistics.median(each["waiting"] / each["seconds"] for each in passes)
            cpu = {kind: self._scale * statistics.median(each[kind] for each in passes) for kind in ("user", "system")}
        return {
            "images_per_second": seconds and self._epoch_iterations * self.batch / seconds,
            "waiting_share": waiting,
            "cpu_seconds": cpu,
            # How it is said here: how many times as long this one takes.
            "ratio": {name: row.over(name) for name in row.speedup},
            "speedup": {},
        }

    def cells(self, row: Row) -> dict[str, str]:
        figures, spread = self.figures(row), row.whole
        cpu = figures["cpu_seconds"] or {}
        # In place of columns that are for milliseconds.
        hidden = ("ms", "limit ms", "extra MB", "model MB", "of copy", f"vs {PLAIN}", f"vs {CACHED}")
        return dict.fromkeys(hidden, "-") | {
            "s/epoch": "-" if spread is None else spread.shown() if self.repeat > 1 else f"{spread.median:.4g}",
            "images/s": shown(figures["images_per_second"], ".1f"),
            "limit s": shown(max(row.limits(WHOLE).values(), default=None), ".3g"),
            "waiting": shown(figures["waiting_share"], ".1%"),
            "CPU s user": shown(cpu.get("user"), ".4g"),
            "system": shown(cpu.get("system"), ".3g"),
            "peak MB": shown(row.peak_bytes, ".0f", 1e6),
            **{f"over {name}": shown(row.over(name), ".3f") for name in (PLAIN, CACHED)},
        }

    def legend(self) -> list[str]:
        plain, dan = PAPER_SECONDS.values()
        return [
            LEGEND[1],
            "waiting: for the next mini-batch, as a share of the time. CPU s: of the loop and its workers, an epoch.",
            f"peak MB: {self.peak_meaning}.",
            f"The paper (Table VIII, ANOTHER MACHINE, with RTX 3090 GPUs): ResNet-50 {plain:.1f} s, DAN {dan:.1f} s an "
            "epoch of Market-1501.",
        ]

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"paper_seconds": PAPER_SECONDS}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """The paper's DAN of order 1 against the plain loop with its own DataLoader."""
        paper = (row for row in rows if (row.contender, row.of["order"]) == (_PAPER, 1))
        ratios = {(row.of["backbone"], *row.of["image_size"]): row.over(PLAIN) for row in paper}
        words = f"{_PAPER}, order 1, over {PLAIN}"
        return [
            at_most(f"{words}: {name}, {size[0]}x{size[1]}", _RATIO, ratios.get((name, *size)))
            for size, name in itertools.product(self.files, self.backbone)
        ]
