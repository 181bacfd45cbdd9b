"""What an iteration does beside the network: losses, competition, finite checks, sums of gradients, optimizer, metrics.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 python scripts/step_profile.py [--recipes dan,paper]

Prints the parts of an iteration, median of the repetitions in ms and as shares, on drawn images and full memories; last
the share of all that is in neither backbone, attention head nor memory. The two variables keep the heap.
"""

import argparse
from collections import defaultdict
from statistics import median
from types import SimpleNamespace

import torch

from dan_fast.bench.iteration.contenders import DANIteration, IterationSize
from dan_fast.bench.iteration.profile import Profile, in_order, share_beside
from dan_fast.training import TrainConfig
from dan_fast.training.step_scalars import StepScalars

MOST = 0.04


def profiled(recipe: str, size: IterationSize, repeat: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each part and the share beside the network, a repetition each."""
    slots = TrainConfig.of_recipe(recipe).memory
    size = size._replace(labeled_slots=slots.labeled_slots, unlabeled_slots=slots.unlabeled_slots)
    dan = DANIteration(size, torch.device("cpu"), "float32", recipe=recipe)
    nobody = torch.full((size.unlabeled_slots + size.images,), -1)
    known = SimpleNamespace(true_labels=nobody, true_ids=nobody)
    scalars = StepScalars(known, dan.step.device, dan.model.network.adversary)
    window = SimpleNamespace(add=lambda *_: None)
    seconds, shares = defaultdict(list), []
    for repetition in range(repeat + 1):
        profile = Profile(dan.step)
        with profile.recording():
            result = dan.step.step(*dan.batch)
            profile.seconds["metrics"] -= profile.now()
            scalars.add(window, result)
            profile.seconds["metrics"] += profile.now()
        if repetition:  # the first one warms up
            shares.append(share_beside(profile.seconds))
            for part, value in profile.seconds.items():
                seconds[part].append(value)
    return seconds, shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="dan,paper")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for recipe in given.recipes.split(","):
        seconds, shares = profiled(recipe, IterationSize(given.backbone, 128, 64), given.repeat)
        whole = sum(map(median, seconds.values()))
        print(f"{recipe}: {given.backbone}, 64 images of 128 x 64, {given.threads} threads: {whole * 1e3:.0f} ms")
        for part in sorted(seconds, key=in_order):
            print(f"{median(seconds[part]) * 1e3:9.2f} ms {median(seconds[part]) / whole:7.2%}  {part}")
        print(f"beside backbone, head and memory: {median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%}), "
              f"at most {MOST:.0%}: {'met' if median(shares) <= MOST else 'MISSED'}")  # fmt: skip


if __name__ == "__main__":
    main()
