"""How a step of the memory module grows with its slots: CPU seconds a slot, and peak memory over what is stored.

    python scripts/memory_scale.py [--slots 10000,100000,1000000] [--dtype bfloat16] [--batch 32] [--threads 1]

M and M' have so many slots each, all of them filled. A step is forward and backward; each size runs in a process of its
own. Seconds are user and system time, the median of the steps after the first two. The peak is resident memory during
the steps above what the process had before it drew the memories; Linux only. The last line compares the smallest size
with the largest.
"""

import argparse
import ctypes
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from dan_fast.bench.machine import resident_peak
from dan_fast.bench.memory.problem import PAPER, Size, make_problem
from dan_fast.functional.memory.pending import PendingMemory
from dan_fast.nn import ProgressiveAugmentedMemory

STEPS = 8


def resident() -> int:
    """Bytes of this process, now."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def module_of(size: Size, dtype: torch.dtype, batches: int) -> tuple[ProgressiveAugmentedMemory, list, int]:
    """The module, its batches and the bytes that it stores."""
    memory, problem = (
        ProgressiveAugmentedMemory(1, 1, size.key_dim, dtype=dtype),
        make_problem(size, dtype, "cpu", batches),
    )
    # Assigning would copy them.
    memory._labeled, memory._unlabeled = map(PendingMemory.of, problem[1:3])
    return memory, problem.batches, sum(tensor.nbytes for state in problem[1:3] for tensor in state)


def step(memory: ProgressiveAugmentedMemory, batch: tuple) -> None:
    keys, labels, unlabeled_keys, sample_ids = batch
    leaves = [each.detach().requires_grad_() for each in (keys, unlabeled_keys)]
    loss = memory(leaves[0], labels, leaves[1], sample_ids).loss
    torch.autograd.grad(loss, [*leaves, memory.alpha, memory.alpha_unlabeled, memory.beta_logit])


def measure(slots: int, dtype: torch.dtype, batch: int, threads: int) -> dict[str, float]:
    """CPU seconds of a step and the peak over what is stored, of a process that has done nothing else."""
    torch.set_num_threads(threads)
    few, batches, _ = module_of(Size(100, 100, PAPER.key_dim, batch), dtype, 1)
    step(few, batches[0])  # what is loaded with the first step is no part of it
    before = resident()
    memory, batches, stored = module_of(Size(slots, slots, PAPER.key_dim, batch), dtype, STEPS)
    # What drawing them left in the heap is no part of the steps either.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    seconds = []
    for each in batches:
        began = cpu_seconds()
        step(memory, each)
        seconds.append(cpu_seconds() - began)
    return {
        "slots": slots,
        "seconds": median(seconds[2:]),
        "peak": (resident_peak() - before) / stored,
        "stored": stored,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="10000,100000,1000000")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=PAPER.batch)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", action="store_true", help="measure one size here and print it as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(int(given.slots), getattr(torch, given.dtype), given.batch, given.threads)))
        return
    found = []
    for slots in given.slots.split(","):
        arguments = [
            "--one",
            *(f"--{name}={value}" for name, value in vars(given).items() if name not in ("one", "slots")),
        ]
        child = subprocess.run(
            [sys.executable, __file__, *arguments, f"--slots={slots}"], stdout=subprocess.PIPE, check=True
        )
        found.append(json.loads(child.stdout))
        one = found[-1]
        print(f"{one['slots']:>8} + {one['slots']} slots, {one['stored'] / 1e9:6.3f} GB stored: "
              f"{one['seconds'] * 1e3:8.1f} ms of CPU a step, {one['seconds'] / one['slots'] * 1e6:6.2f} us a slot, "
              f"peak {one['peak']:.2f} times what is stored", flush=True)  # fmt: skip
    few, many = (min(found, key=lambda each: each["slots"]), max(found, key=lambda each: each["slots"]))
    ratio = (many["seconds"] / many["slots"]) / (few["seconds"] / few["slots"])
    print(f"a slot of the largest takes {ratio:.3f} times one of the smallest (linear within 15 %: 0.85 to 1.15)")


if __name__ == "__main__":
    main()
