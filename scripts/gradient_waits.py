"""What overlapping the sums of gradients with the backward pass could save at most, on the ranks that torchrun starts.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/gradient_waits.py

A rank times each iteration and, in it, the sums of its gradients from where all ranks have come to them, so that
who is late does not count: copies into buckets, what travels, and the waits. No overlap can hide more than that.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from rank_overhead import CLASSES, SAMPLES, SIZE, split, step_of
from torch import distributed

import dan_fast.training.step as step_module
from dan_fast.core.heap import keep_heap
from dan_fast.nn import DAN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=12, help="iterations that are timed")
    parser.add_argument("--backbone", default="resnet18")
    given = parser.parse_args()
    keep_heap()
    distributed.init_process_group("gloo")
    rank, ranks, sums = distributed.get_rank(), distributed.get_world_size(), [0.0]
    add_up = step_module.add_up

    def timed(*arguments: Any) -> list[torch.Tensor]:
        distributed.barrier()
        began = time.perf_counter()
        found = add_up(*arguments)
        sums[0] += time.perf_counter() - began
        return found

    step_module.add_up = timed
    torch.manual_seed(0)
    step = step_of(DAN(CLASSES, given.backbone, image_size=SIZE, dropout=0.0), distributed.group.WORLD)
    shares, seconds = [], []
    for turn in range(given.repeat + 2):
        halves = [split(2 * (turn * ranks + rank) + half) for half in range(2)]
        distributed.barrier()
        sums[0], began = 0.0, time.perf_counter()
        step.step(*halves)
        seconds.append(time.perf_counter() - began)
        shares.append(sums[0] / seconds[-1])
    if rank == 0:
        shares, seconds = sorted(shares[2:]), seconds[2:]
        print(
            f"{given.backbone}, {SIZE[0]} x {SIZE[1]}, {SAMPLES} + {SAMPLES} images a rank, {ranks} ranks, "
            f"{torch.get_num_threads()} threads each, torch {torch.__version__}: sums of gradients take "
            f"{statistics.median(shares):.1%} of an iteration ({shares[0]:.1%} to {shares[-1]:.1%}) of "
            f"{statistics.median(seconds):.3f} s"
        )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
