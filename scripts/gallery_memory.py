"""Bytes that an evaluation takes on a rank for each image of the gallery that another rank holds.

    MALLOC_MMAP_THRESHOLD_=65536 MALLOC_TRIM_THRESHOLD_=0 OMP_NUM_THREADS=1 \\
        torchrun --nproc-per-node 2 scripts/gallery_memory.py

Rank 0 holds the same images each time and the last rank more and more; the slope of rank 0's peak is what is printed,
Linux's VmHWM, which is set back before each evaluation. The variables have memory given back once it is freed.
"""

from functools import partial
from pathlib import Path

import torch
from torch import distributed

from dan_fast.bench.machine import resident_peak
from dan_fast.evaluation import evaluate_ranking, evaluate_reranked

OWN, QUERIES, WIDTH, BLOCK_BYTES = 500, 50, 32, 1 << 20
# Images of the last rank, which re-ranking compares with each other.
OTHERS = {evaluate_ranking: (40000, 80000, 160000), evaluate_reranked: (3000, 6000, 12000)}


def peak_of(evaluate: partial, images: int) -> int:
    """Bytes of the process."""
    generator = torch.Generator().manual_seed(distributed.get_rank())
    gallery = torch.randn(images, WIDTH, generator=generator)
    ids, query = torch.arange(images) // 4, torch.randn(QUERIES, WIDTH, generator=torch.Generator().manual_seed(9))
    Path("/proc/self/clear_refs").write_text("5")
    evaluate(query, gallery, torch.arange(QUERIES), ids, torch.zeros(QUERIES).long(), torch.ones(images).long())
    return resident_peak()


def main() -> None:
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    for evaluate, others in OTHERS.items():
        measured = partial(evaluate, block_bytes=BLOCK_BYTES, process_group=distributed.group.WORLD)
        # The first one takes what libraries take once.
        peaks = [peak_of(measured, images if rank == ranks - 1 else OWN) for images in (others[0], *others)][1:]
        slopes = [(b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], others, others[1:], strict=False)]
        if rank == 0:
            print(
                f"{evaluate.__name__}: {', '.join(f'{peak / 2**20:.1f}' for peak in peaks)} MiB beside {others} images "
                f"on the last of {ranks} ranks; {', '.join(f'{slope:.0f}' for slope in slopes)} bytes an image"
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
