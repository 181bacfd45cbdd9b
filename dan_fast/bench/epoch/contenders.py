"""Loops through an epoch's mini-batches: a plain one fed by torch or by this package's cache, and the trainer's."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from dan_fast.bench.agreement import too_large
from dan_fast.bench.data import PlainImages, apart, planned
from dan_fast.bench.iteration.contenders import PlainNetwork, fill_memory
from dan_fast.bench.machine import resident_peak
from dan_fast.core.devices import synchronize
from dan_fast.daml import Stage
from dan_fast.data import MiniBatch, TrainingSet, read_image, train_transform
from dan_fast.data.images.transforms import resize
from dan_fast.data.synthetic import synthesize
from dan_fast.nn import build_backbone
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.scalars import Scalars
from dan_fast.training.sources import load_datasets

PLAIN, CACHED = "plain", "cached"
# The recipe of which the plain loops take their images: all of them labelled.
PLAIN_RECIPE = "plain"
# Half of the persons are labelled where a recipe has a use for others.
_DOMAINS = ("campus", "station")
_CAMERAS, _IMAGES_PER_CAMERA = 6, 2
_PER_PERSON = len(_DOMAINS) * _CAMERAS * _IMAGES_PER_CAMERA
# Mini-batches before those that are timed, whose images and losses are compared: what rounding does grows with a step.
_FIRST = 2
# Mini-batches that a worker of torch's DataLoader decodes ahead.
_AHEAD = 2
_TICKS = os.sysconf("SC_CLK_TCK")


class Epoch(NamedTuple):
    """What is gone through: `iterations` mini-batches are measured after `untimed` ones of the same pass.

    Where some are untimed the pass goes on after those that are measured: when the clock stops workers have decoded as
    much for later ones as they had when it started. `folder` is that of `draw_files`, `cache` the cache's;
    `workers` are the plain DataLoader's.
    """

    folder: str
    cache: str
    backbone: str
    height: int
    width: int
    batch: int
    iterations: int
    workers: int
    device: str
    untimed: int = 0

    @property
    def planned(self) -> int:
        """Mini-batches of a pass."""
        return self.untimed + self.iterations + (_AHEAD * max(1, self.workers) if self.untimed else 0)

    def settings(self, recipe: str, order: int = 1, out: str = "unused") -> TrainConfig:
        """Of a training from random weights."""
        domains = [str(Path(self.folder) / name) for name in _DOMAINS]
        labeled = domains if recipe == PLAIN_RECIPE else domains[:1]
        data = {"labeled": labeled, "unlabeled": domains[len(labeled) :], "image_size": (self.height, self.width)}
        data |= {"batch_size": self.batch, "workers": self.workers, "cache": self.cache}
        data |= {"iterations": self.planned}
        # Of all the same backbone, which is the plain loop's.
        model = {"backbone": self.backbone, "weights": "none", "instance_norm": False}
        run = {"out": out, "device": self.device}
        return TrainConfig.of_recipe(recipe, data=data, model=model, meta={"order": order}, run=run)


def drawn_images(images: int) -> int:
    """How many are drawn where so many are wanted: two persons or more in each domain, and no less than wanted."""
    return max(2, -(-images // _PER_PERSON)) * _PER_PERSON


def draw_files(root: Path, size: tuple[int, int], images: int, progress: Any = None) -> Path:
    """The folder of the domains below `root`, drawn unless they are there."""
    persons = drawn_images(images) // _PER_PERSON
    folder = root / f"{size[0]}x{size[1]}-{persons}-persons"
    # A manifest is there where its domain is whole.
    missing = [name for name in _DOMAINS if not (folder / name / "manifest.csv").is_file()]
    if missing:
        shape = (persons, _CAMERAS, _IMAGES_PER_CAMERA)
        synthesize(folder, missing, *shape, image_size=size, test_fraction=0.0, progress=progress)
    return folder


class Feed:
    """The mini-batches of a recipe, by the trainer's own way and by torch's DataLoader."""

    def __init__(self, epoch: Epoch, recipe: str) -> None:
        self.image_size = (epoch.height, epoch.width)
        network = build_backbone(epoch.backbone, image_size=self.image_size)
        # What the batches of a training read of its network.
        network.image_size = self.image_size
        config, self.epoch, self.preprocessing = epoch.settings(recipe), epoch, network.preprocessing
        self.datasets = load_datasets(config.data)
        self.training_set = TrainingSet(self.datasets.labeled, self.datasets.unlabeled,
                                        unlabeled_share=config.data.unlabeled_share)  # fmt: skip
        self.batches = TrainingBatches(config, self.training_set, network, torch.device(epoch.device))

    def cached(self, number: int, first: int = 0) -> Iterable[MiniBatch]:
        """The trainer's, from the cache."""
        return self.batches.of_epoch(number, None, first)

    def plain(self, number: int, first: int = 0) -> DataLoader:
        """torch's: the images of each mini-batch, S before S~, with their classes, on the same draws."""
        samples, seeds = planned(self.training_set, islice(self.batches.planner.batches(number), first, None))
        images = PlainImages(samples, train_transform(self.image_size, self.preprocessing), seeds)
        pin = self.epoch.device != "cpu"
        return DataLoader(images, self.epoch.batch, num_workers=self.epoch.workers, pin_memory=pin)

    def compare(self) -> tuple[str | None, str]:
        """What of the first mini-batches differs between both ways, None if nothing does, and how they agree."""
        first = max(0, self.batches.planner.iterations - _FIRST)
        plain, read = self.plain(0, first), self.batches.cache.read
        resized = resize(self.image_size, self.preprocessing.interpolation)
        paths = [sample.path for sample in plain.dataset.samples]
        unequal = sum(not torch.equal(read(path), resized(read_image(path))) for path in paths)
        if unequal:
            return f"{unequal} of {len(paths)} decoded images are not equal", ""
        differs, found = apart(plain, self.cached(0, first), self.preprocessing.std)
        if not found:
            return differs, ""
        levels = "up to {:.2g} grey levels in {:.1e} of the pixels".format(*found)
        return differs, f"{len(paths)} images equal bit for bit as decoded, augmented {levels}"


def compare_feeds(recipe: str, epoch: Epoch) -> tuple[str | None, str, float]:
    """`Feed.compare`, and the seconds that the cache was filled in before."""
    feed = Feed(epoch, recipe)
    start = time.perf_counter()
    feed.batches.fill_cache([*feed.datasets.labeled, *feed.datasets.unlabeled])
    return *feed.compare(), time.perf_counter() - start


def compare_losses(losses: list[float], expected: list[float]) -> tuple[str | None, str]:
    """What differs between the losses of two plain loops, None if nothing does, and how they agree."""
    pairs = list(zip(losses, expected, strict=True))
    # The sum and not the maximum, which may pass over NaN.
    largest = sum(abs(one - other) / abs(other) for one, other in pairs)
    what = f"losses of the first {len(pairs)} steps"
    differs = next(iter(too_large({what: largest}, {what: 1e-3})), None)
    return differs, f"{what} by {largest:.1e}"


# The mini-batches of an epoch by its number, from a first one on; and a step with one, which may return the loss.
Loop = tuple[Callable[..., Iterable[Any]], Callable[[Any], Tensor | None]]


def plain_loop(epoch: Epoch, contender: str) -> Loop:
    """The plain network, fed by torch's DataLoader or from the cache."""
    torch.manual_seed(0)
    feed = Feed(epoch, PLAIN_RECIPE)
    classes, device = feed.training_set.num_classes, torch.device(epoch.device)
    network = PlainNetwork(epoch.backbone, feed.image_size, classes, device)
    if contender == PLAIN:
        return feed.plain, lambda batch: network.step(*batch)
    feed.batches.fill_cache(feed.datasets.labeled)
    return feed.cached, lambda batch: network.step(batch.meta_train.images, batch.meta_train.labels)


def trainer_loop(epoch: Epoch, recipe: str, order: int, out: str) -> Loop:
    """The trainer's batches, steps and scalars; full memories, and the attention branch wins each competition."""
    trainer, scalars = Trainer(epoch.settings(recipe, order, out)), Scalars(Path(out) / "tensorboard")
    datasets, model, training_set = trainer.datasets, trainer.model, trainer.training_set
    trainer.batches.fill_cache([*datasets.labeled, *datasets.unlabeled])
    if model.memory is not None:
        fill_memory(model.memory, training_set.num_classes, len(training_set.unlabeled_samples))
    # The dearer kind: the backbone is updated.
    trainer.meta_step.competition.decide = lambda attention_won: Stage.ATTENTION
    model.train()

    def batches(number: int, first: int = 0) -> Iterable[MiniBatch]:
        trainer.epoch, trainer.iteration = number, first
        return trainer.batches.of_epoch(number, None, first)

    def train(batch: MiniBatch) -> None:
        trainer.train_iteration(batch, scalars)
        trainer.iteration += 1
        if trainer.iterations_done % trainer.config.run.log_every == 0:
            scalars.flush(trainer.iterations_done)

    return batches, train


def measure(contender: str, order: int | None, epoch: Epoch) -> dict[str, Any]:
    """One pass of a contender in this process, after some mini-batches of another epoch; see `EpochBenchmark.meaning`.

    The contender is PLAIN, CACHED, or a recipe of the trainer's with the order of its meta gradients.
    """
    with TemporaryDirectory(prefix="dan-fast-bench-") as out:
        plain = contender in (PLAIN, CACHED)
        batches, train = plain_loop(epoch, contender) if plain else trainer_loop(epoch, contender, order or 1, out)
        losses = []
        for batch in batches(0, max(0, epoch.planned - _FIRST)):
            with FlopCounterMode(display=False) as counter:
                losses.append(train(batch))
        found = go_through(batches, train, epoch)
    cuda = torch.device(epoch.device).type == "cuda"
    found |= {"flop": operations(counter), "losses": [loss.item() for loss in losses if loss is not None]}
    return found | {"peak_bytes": torch.cuda.max_memory_allocated(epoch.device) if cuda else resident_peak()}


def operations(counter: FlopCounterMode) -> int:
    """Those counted; a backward of convolutions is at most twice the forward, which the counter misses in groups."""
    counts = counter.get_flop_counts()["Global"]
    forward, backward = (counts.get(op, 0) for op in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward))
    return counter.get_total_flops() - max(0, backward - 2 * forward)


def go_through(batches: Callable[..., Iterable[Any]], train: Callable[[Any], Any], epoch: Epoch) -> dict[str, Any]:
    """Seconds of a pass, of waiting for batches in it, and CPU seconds of all its processes."""
    device, count, waiting = torch.device(epoch.device), 0, 0.0
    synchronize(device)
    before, start = cpu_seconds(), time.perf_counter()
    waits = start
    # Held to the end: where it is dropped its workers end, which takes time.
    held = iter(batches(1))
    for number, batch in enumerate(held, start=1):
        waiting += time.perf_counter() - waits
        train(batch)
        if number == epoch.untimed:
            # What comes once an epoch, as the pages that a fork makes a process copy, is not to be extrapolated.
            synchronize(device)
            before, start, waiting = cpu_seconds(), time.perf_counter(), 0.0
        count = number - epoch.untimed
        waits = time.perf_counter()
        if epoch.untimed and count == epoch.iterations:
            break
    waiting += time.perf_counter() - waits
    synchronize(device)
    seconds = time.perf_counter() - start
    user, system = (after - each for after, each in zip(cpu_seconds(), before, strict=True))
    if count != epoch.iterations:
        raise RuntimeError(f"{count} mini-batches came, {epoch.iterations} were planned")
    return {"seconds": seconds, "waiting": waiting, "user": user, "system": system}


def cpu_seconds() -> tuple[float, float]:
    """User and system seconds of this process and of those that it has started, its workers among them."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    user, system = sum(usage.ru_utime for usage in usages), sum(usage.ru_stime for usage in usages)
    for worker in multiprocessing.active_children():
        # The system counts them as children only once they have ended.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = user + int(fields[11]) / _TICKS, system + int(fields[12]) / _TICKS
    return user, system
