"""What an iteration of DAN takes more than one of the plain network on as many images, and in which parts.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python scripts/step_profile.py [--recipes dan,paper]

Drawn images, full memories, the backbone updated; plain and DAN in turn, medians of the repetitions, in ms and as a
share of plain's iteration. Last the share of DAN's own that is in neither backbone, attention head nor memory. The two
variables keep the heap. Where others use the machine, time what the main thread computes, without its waits:

    OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0 python scripts/step_profile.py --clock thread
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dan_fast.bench.iteration.contenders import UPDATED, DANIteration, IterationSize, plain_iteration
from dan_fast.bench.iteration.profile import TEST, TRAIN, Profile, in_order
from dan_fast.training import TrainConfig
from dan_fast.training.step_scalars import StepScalars

MOST = 0.04
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
Seconds = dict[str, float]
# Parts with models and bars of their own; what is left is what a step does beside them.
_OF_THE_NETWORK = ("backbone", "head", "memory")


def of_plain(plain: partial[Tensor], now: Callable[[], float]) -> Seconds:
    """Seconds of the parts of one iteration of the plain network, named as `Profile` names them."""
    marks = [now()]

    def mark(*_: Any) -> None:
        marks.append(now())

    def watch(_: Any, inputs: Any, maps: Tensor) -> None:
        mark()
        maps.register_hook(mark)

    network = plain.func.__self__
    backbone, optimizer = network.backbone, network.optimizer
    handles = [backbone.register_forward_pre_hook(mark), backbone.register_forward_hook(watch),
               optimizer.register_step_pre_hook(mark), optimizer.register_step_post_hook(mark)]  # fmt: skip
    plain()
    mark()
    for handle in handles:
        handle.remove()
    parts = ["rest", "forward: backbone", "losses", "backward: backbone", "optimizer", "rest"]
    seconds: Seconds = defaultdict(float)
    for part, (begun, ended) in zip(parts, pairwise(marks), strict=True):
        seconds[part] += ended - begun
    return seconds


def of_dan(dan: DANIteration, scalars: StepScalars, now: Callable[[], float]) -> Seconds:
    """Seconds of the parts of one iteration of DAN."""
    window, profile = SimpleNamespace(add=lambda *_: None), Profile(dan.step)
    profile.now = now
    with profile.recording():
        result = dan.step.step(*dan.batch)
        profile.seconds["metrics"] -= now()
        scalars.add(window, result)
        profile.seconds["metrics"] += now()
    return profile.seconds


def profiled(recipe: str, size: IterationSize, repeat: int, now: Callable[[], float]) -> list[tuple[Seconds, Seconds]]:
    """Seconds of each part of plain and of DAN, a repetition each."""
    slots = TrainConfig.of_recipe(recipe).memory
    size = size._replace(labeled_slots=slots.labeled_slots, unlabeled_slots=slots.unlabeled_slots)
    dan = DANIteration(size, torch.device("cpu"), "float32", recipe=recipe)
    dan.set(dan.step.meta.order, UPDATED)
    plain = plain_iteration(size, dan)
    nobody = torch.full((size.unlabeled_slots + size.images,), -1)
    known = SimpleNamespace(true_labels=nobody, true_ids=nobody)
    scalars = StepScalars(known, dan.step.device, dan.model.network.adversary)
    # The first one warms up.
    return [(of_plain(plain, now), of_dan(dan, scalars, now)) for _ in range(repeat + 1)][1:]


def table(pairs: list[tuple[Seconds, Seconds]]) -> list[str]:
    """A line for each part: ms of S, of S~, of all of DAN and of plain, and what DAN takes more."""
    plain, dan = ({part: median(each[part] for each in side) for part in side[0]} for side in zip(*pairs, strict=True))
    whole = median(sum(each.values()) for each, _ in pairs)
    parts: dict[str, Seconds] = {part: {} for part in plain}
    for part in sorted(dan, key=in_order):
        way, _, name = part.rpartition(": ")
        way, _, split = way.partition(" ")
        # The losses of plain are its classifier, both ways.
        row = "losses" if name == "losses" else f"{way}: {name}" if way else name
        cells = parts.setdefault(row, {})
        for column in (split, "DAN"):
            cells[column] = cells.get(column, 0.0) + dan[part]
    parts["sum"] = {"DAN": sum(dan.values())}
    plain["sum"] = sum(plain.values())
    lines = [f"{'':20}" + "".join(f"{name:>9}" for name in (TRAIN, TEST, "DAN", "plain")) + "   more, of plain"]
    for part in sorted(parts, key=lambda part: (part == "sum", ":" not in part, part.startswith("backward"), part)):
        cells = parts[part] | {"plain": plain.get(part, 0.0)}
        ms = "".join(f"{1e3 * cells[x]:9.1f}" if x in cells else f"{'':9}" for x in (TRAIN, TEST, "DAN", "plain"))
        lines.append(f"{part:20}{ms} {(cells.get('DAN', 0.0) - cells['plain']) / whole:+9.2%}")
    return lines


def share_beside(seconds: Seconds) -> float:
    """Which share of an iteration's time is in no part of the network: losses, optimizer and rest."""
    beside = sum(value for part, value in seconds.items() if part.rpartition(" ")[2] not in _OF_THE_NETWORK)
    return beside / sum(seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="dan,paper")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    height, width = given.size
    for recipe in given.recipes.split(","):
        pairs = profiled(recipe, IterationSize(given.backbone, height, width), given.repeat, CLOCKS[given.clock])
        ratios = [sum(dan.values()) / sum(plain.values()) for plain, dan in pairs]
        print(f"{recipe}: {given.backbone}, 64 of {height} x {width}, {given.threads} threads, {given.clock} clock:")
        print(f"{median(ratios):.3f} times plain ({min(ratios):.3f} to {max(ratios):.3f}); ms")
        print(*table(pairs), sep="\n")
        shares = [share_beside(dan) for _, dan in pairs]
        print(f"beside backbone, head and memory: {median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}), "
              f"at most {MOST:.0%}: {'met' if median(shares) <= MOST else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
