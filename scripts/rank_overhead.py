"""What a training step of one rank costs with a process group, over the same step without one.

    python scripts/rank_overhead.py --threads 2

Both take the same steps from the same state, in turns, and their first gradients have to agree. A job of one rank under
torchrun makes no group, so this is more than it pays: shares are told, gradients travel through buckets, the memory
gathers.
"""

import argparse
import copy
import statistics
import tempfile
import time

import torch
from torch import distributed

from dan_fast.core.heap import keep_heap
from dan_fast.data import Split
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training import LossConfig, MetaConfig, MetaStep, TrainingModel

SIZE, CLASSES, SAMPLES = (128, 64), 751, 32


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeat", type=int, default=20, help="steps of each that are timed")
    parser.add_argument("--backbone", default="resnet18")
    given = parser.parse_args()
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
