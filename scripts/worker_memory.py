"""Host memory over epochs of loading: PSS of the process and its workers, after a tenth and at the end of each epoch.

    python scripts/worker_memory.py [--entries 200000] [--epochs 20] [--workers 2] [--batches 0]

The entries are names of files that do not exist. Decoding and what is drawn for the augmentation are replaced by zeros,
so that only the memory of the loader itself is measured, and quickly. Prints a line an epoch and, last, how far
from flat all these are.
"""

import argparse
import multiprocessing
from pathlib import Path

import torch

from dan_fast.data import BatchPlanner, ReIDDataset, Sample, TrainingSet
from dan_fast.data.images import loader
from dan_fast.data.images.augment import Draws

IMAGE_SIZE = (8, 4)


def pss_mib(process: int | str) -> float:
    """A process's own pages and its share of those that it shares with its parent and children, without the libraries,
    which unrelated processes may share too.
    """
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 1024


def total_mib() -> float:
    return pss_mib("self") + sum(pss_mib(child.pid) for child in multiprocessing.active_children())


def blank(path: Path) -> torch.Tensor:
    """In the place of the decoder."""
    return torch.zeros(3, *IMAGE_SIZE, dtype=torch.uint8)


def no_draws(seeds: list[int], image_size: tuple[int, int]) -> Draws:
    count = len(seeds)
    flips, offsets = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    return Draws(flips, offsets, offsets, torch.arange(3).expand(count, 3).clone(), torch.ones(count, 3))


def dataset(name: str, entries: int) -> ReIDDataset:
    root = Path("/data/reid") / name / "bounding_box_train"
    samples = (Sample(root / f"{n // 20:06d}_c{n % 6}s1_{n:08d}_00.jpg", n // 20, n % 6) for n in range(entries))
    return ReIDDataset(name, root, train=tuple(samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=0, help="batches of an epoch; 0: as many as the entries fill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loader.read_image, loader.draw = blank, no_draws
    half = arguments.entries // 2
    source = TrainingSet([dataset("market", half)], [dataset("msmt17", arguments.entries - half)])
    planner = BatchPlanner(source.labels, len(source.unlabeled_samples), batch_size=512, iterations=arguments.batches)
    totals: list[float] = []
    # Near the end the workers are still there.
    looks = max(1, planner.iterations // 10), planner.iterations - 2 * arguments.workers - 1
    if looks[0] >= looks[1]:
        parser.error(f"an epoch needs at least {2 * arguments.workers + 3} batches: raise --batches or --entries")
    for epoch in range(arguments.epochs):
        batches = loader.training_loader(source, planner.batches(epoch), IMAGE_SIZE, workers=arguments.workers)
        for number, _ in enumerate(batches, start=1):
            if number in looks:
                totals.append(total_mib())
        print(f"epoch {epoch + 1}: {totals[-2]:.1f} MiB after a tenth, {totals[-1]:.1f} at the end", flush=True)
    lowest, highest = min(totals), max(totals)
    print(f"{100 * (highest - lowest) / lowest:.1f} % between the lowest and the highest")


if __name__ == "__main__":
    main()
