"""What one rank costs: a training under torchrun over the same one without it, or a step with a group over one without.

    python scripts/rank_overhead.py --threads 2 --trainings 5
    python scripts/rank_overhead.py --threads 2

Trainings are whole processes, in turns, a short and a long one each way: an iteration is what the long one takes more,
divided by the iterations it has more, so that start and end fall out. CPU seconds are those of all their processes,
torchrun's own among them, and hold on a machine that others use.

Steps are in one process from one state, in turns, and their first gradients have to agree. A job of one rank under
torchrun makes no group, so this is more than it pays: shares are told, gradients travel through buckets, the memory
gathers.
"""

import argparse
import copy
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed

from dan_fast.core.heap import keep_heap
from dan_fast.data import Split
from dan_fast.data.synthetic import synthesize
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training import LossConfig, MetaConfig, MetaStep, TrainingModel

SIZE, CLASSES, SAMPLES = (128, 64), 751, 32
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]


def split(seed: int) -> Split:
    """Half of a mini-batch: as many labelled as unlabelled images."""
    generator = torch.Generator().manual_seed(seed)
    labeled = SAMPLES // 2
    labels = torch.cat([torch.randint(CLASSES, (labeled,), generator=generator), torch.full((labeled,), -1)])
    ids = torch.cat([torch.full((labeled,), -1), torch.arange(labeled) + labeled * seed])
    images = torch.randn(SAMPLES, 3, *SIZE, generator=generator).contiguous(memory_format=torch.channels_last)
    return Split(images, labels, ids, labeled, 0)


def step_of(network: DAN, group: distributed.ProcessGroup | None) -> MetaStep:
    network = copy.deepcopy(network).train()
    memory = ProgressiveAugmentedMemory(key_dim=network.key_dim, process_group=group)
    model = TrainingModel(network, memory, LossConfig()).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    return MetaStep(model, optimizer, MetaConfig(), process_group=group)


def require_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Of the first step, from one state: later ones part by what rounding makes of a ReLU."""
    largest = max(value.norm() for value in one.values())
    for name, value in one.items():
        if not (other[name] - value).norm() <= 1e-4 * max(value.norm(), 1e-3 * largest):
            raise SystemExit(f"The gradients of {name} differ: nothing is to be compared.")


def seconds_of_training(images: Path, out: Path, torchrun: bool, iterations: int, given: argparse.Namespace) -> tuple:
    """(wall, CPU) seconds of a training from its start to its end."""
    settings = {
        "data.labeled": images / "campus", "data.unlabeled": images / "mall", "data.image_size": list(SIZE),
        "data.batch_size": 2 * SAMPLES, "data.iterations": iterations, "data.workers": 0,
        "model.backbone": given.backbone, "model.weights": "none", "optimizer.epochs": 1, "run.device": "cpu",
        "run.out": out,
    }  # fmt: skip
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, *(TORCHRUN if torchrun else []), "-m", "dan_fast", "train", *words]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads)}
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare_trainings(given: argparse.Namespace) -> None:
    found: dict[str, list[list[float]]] = {"wall": [[], []], "CPU": [[], []]}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        synthesize(images, ("campus", "mall"), identities=20, image_size=SIZE)
        for pair in range(given.trainings):
            for torchrun in (False, True) if pair % 2 else (True, False):
                ends = [
                    seconds_of_training(images, Path(folder) / f"{pair}-{torchrun}-{count}", torchrun, count, given)
                    for count in (2, 2 + given.iterations)
                ]
                for clock, short, long in zip(found, *ends, strict=True):
                    found[clock][torchrun].append((long - short) / given.iterations)
    print(f"trainings of {given.backbone}, {SIZE[0]} x {SIZE[1]}, {2 * SAMPLES} images, {given.threads} threads, torch "
          f"{torch.__version__}; {given.trainings} pairs, an iteration is a mean of {given.iterations}")  # fmt: skip
    for clock, (alone, launched) in found.items():
        ratios = sorted(b / a for a, b in zip(alone, launched, strict=True))
        print(
            f"{clock} seconds of an iteration: {statistics.median(alone):.3f} without torchrun, under it "
            f"{statistics.median(launched):.3f}; ratio of pairs {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=20, help="steps of each that are timed")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--trainings", type=int, default=0, help="pairs of trainings; 0 compares steps")
    parser.add_argument("--iterations", type=int, default=20, help="by which the longer training is longer")
    given = parser.parse_args()
    if given.trainings:
        compare_trainings(given)
        return
    keep_heap()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        network = DAN(CLASSES, given.backbone, image_size=SIZE, dropout=0.0)
        steps = [step_of(network, group) for group in (None, distributed.group.WORLD)]
        seconds: list[list[float]] = [[], []]
        grads: list[dict[str, torch.Tensor]] = [{}, {}]
        for turn in range(given.repeat + 3):
            halves = split(2 * turn), split(2 * turn + 1)
            for which in (0, 1) if turn % 2 else (1, 0):
                began = time.perf_counter()
                grads[which] = steps[which].step(*halves).grads
                if turn >= 3:
                    seconds[which].append(time.perf_counter() - began)
            if turn == 0:
                require_alike(*grads)
        distributed.destroy_process_group()
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    print(
        f"{given.backbone}, {SIZE[0]} x {SIZE[1]}, {SAMPLES} + {SAMPLES} images, {given.threads} threads, torch "
        f"{torch.__version__}: {statistics.median(seconds[0]):.3f} s without a group, with one "
        f"{statistics.median(seconds[1]):.3f} s; ratio of pairs {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}); the first gradients agree"
    )


if __name__ == "__main__":
    main()
