"""Predictions for many ranks: what a memory step and a data-parallel iteration would take, as tables in Markdown.

    python scripts/scaling_model.py

Nothing that it prints was measured. It puts together the bytes and collectives that docs/scaling.md counts, figures
measured on one GPU (benchmarks/results/h200), and data sheets. docs/scaling.md holds what it prints; a test compares.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dan_fast.bench.memory.problem import PAPER, Size, model_bytes, product_flop

MEASURED = Path(__file__).resolve().parents[1] / "benchmarks/results/h200"


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, by data sheets: bytes a second, operations a second, bytes."""

    name: str
    nodes: int
    gpus: int  # of a node
    bandwidth: float
    float32: float
    cycles: float  # multiprocessors times boost clock
    memory: float
    link: float  # one direction of a GPU's link within the node
    hop: float  # seconds from GPU to GPU within the node
    network: float = 0.0  # one direction of all network cards of a node

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    def _ring(self, rounds: int, size: float) -> float:
        """`rounds` times around the ring, but for the last hop; each hop hands on `size` bytes."""
        between = rounds * (self.nodes - 1)
        latency = RING + between * NETWORK_HOP + (rounds * (self.ranks - 1) - between) * self.hop
        slowest = min(self.link, self.network) if self.nodes > 1 else self.link
        return latency + rounds * (self.ranks - 1) * size / slowest

    def all_gather(self, size: float) -> float:
        """Seconds; `size` bytes are handed in by each rank."""
        return self._ring(1, size) if self.ranks > 1 else 0.0

    def all_reduce(self, size: float) -> float:
        return self._ring(2, size / self.ranks) if self.ranks > 1 else 0.0


# NCCL's own model of its rings, src/graph/tuning.cc: to begin (protocol LL), and a hop by NVLink, PCIe and network.
RING, NVLINK_HOP, PCIE_HOP, NETWORK_HOP = 6.6e-6, 0.6e-6, 1.0e-6, 2.7e-6
# GeForce GPUs hand nothing to each other directly: all goes through the host's memory, written once and read once. Its
# eight channels of DDR4-3200 have 204.8 GB/s for 8 GPUs, less than the 31.5 of PCIe 4.0 x16 for each.
HOST_MEMORY = 204.8e9 / (8 * 2)
_RTX_3090 = dict(bandwidth=936e9, float32=35.6e12, cycles=82 * 1.695e9, memory=24e9, link=HOST_MEMORY, hop=PCIE_HOP)
_H100 = dict(bandwidth=3.35e12, float32=66.9e12, cycles=132 * 1.98e9, memory=80e9, link=450e9, hop=NVLINK_HOP)
ONE = Machine("1 x H100", 1, 1, **_H100)
MANY = (
    Machine("8 x RTX 3090", 1, 8, **_RTX_3090),
    Machine("8 x H100", 1, 8, **_H100),
    Machine("64 x H100", 8, 8, **_H100, network=8 * 50e9),  # a card of 400 Gbit/s for each GPU
)
H200_BANDWIDTH, H200_CYCLES = 4.8e12, 132 * 1.98e9

POWERS = range(4, 9)  # of ten: slots
MEASURED_BATCH = PAPER.batch
ITEMSIZE = 4  # of float32
# Labels, sample ids, usage, evaluation and norms of a slot, as docs/scaling.md counts them.
STATISTICS = 36
CLASSES = 751  # of the measured iteration
STATISTICS_OF_RESNET50 = 53120  # means and variances of 53 batch norms
# How often all gradients are added up in an iteration of each order while attention leads: docs/scaling.md.
SUMS = {1: 2, 2: 4}
# What a collective of a sharded scan carries at most: a histogram of 256 counts, and the sums that travel with it.
EXCHANGED = 256 * 4 + 64


@dataclass(frozen=True)
class Measured:
    """Of the kernels of `ProgressiveAugmentedMemory`, forward and backward, float32, on one H200."""

    host: float  # seconds of a step that no slot adds to: launches
    fixed: float  # seconds of the scan without slots
    a_slot: float  # seconds that a slot adds to the scan
    extra: float  # bytes that a slot adds to the peak
    copy: float  # bandwidth of a copy over that of the data sheet


def measured() -> Measured:
    """The scan is what the passes leave of a step, a line through the two largest sizes; the smallest is launches."""
    rows = json.loads((MEASURED / "memory_sizes.json").read_text())["rows"]
    of = {row["scale"]: row for row in rows if (row["contender"], row["use"]) == ("kernels", "module")}
    seconds = {scale: row["seconds"]["forward_backward"]["median"] for scale, row in of.items()}
    few, many = (of[scale] for scale in (4, 16))
    copy = many["bandwidth"] / H200_BANDWIDTH

    def scan(row: dict) -> float:
        passed = passes(Size(**row["size"]), copy * H200_BANDWIDTH, _H100["float32"])
        return seconds[row["scale"]] - passed

    counts = [Size(**row["size"]).slots for row in (few, many)]
    a_slot = (scan(many) - scan(few)) / (counts[1] - counts[0])
    return Measured(seconds[0.25], scan(few) - a_slot * counts[0], a_slot, many["peak_extra_bytes"] / counts[1], copy)


def passes(size: Size, bandwidth: float, float32: float) -> float:
    """Seconds in which the rows of features are read, written and read again, and multiplied by the keys."""
    moved = model_bytes(size, ITEMSIZE, "module", "forward_backward")
    return max(moved / bandwidth, product_flop(size, "forward_backward") / float32)


def coefficients(found: Measured) -> str:
    titles = ("launches, ms", "scan, ms", "scan, ns a slot", "bytes a slot", "copy / data sheet")
    values = (found.host * 1e3, found.fixed * 1e3, found.a_slot * 1e9, found.extra, found.copy)
    return table(
        ["measured", *titles],
        [["one H200", *map("{:.3g}".format, values[:3]), f"{found.extra:.0f}", f"{found.copy:.2f}"]],
    )


def parameters(classes: int) -> int:
    """Of a DAN with ResNet-50: its layers, classifier and attention."""
    return 23_508_032 + 2048 * classes + 697_104


def score_bytes(size: Size) -> float:
    """Of the scores and norms of all slots."""
    rows = 2 * size.batch
    return 4 * ((rows + 1) * size.labeled_slots + (size.batch + 1) * size.unlabeled_slots)


def scan_collectives(size: Size) -> int:
    """Where the CUDA scan has a barrier of the grid: csrc/memory/scan/scan_cuda_forward.cuh, scan_cuda_backward.cuh."""
    # 2 a labelled sample, 2 for all retrievals, 2 and at most 2 passes of a selection an unlabelled one, 2 at the end.
    return 2 * size.batch + 2 + 4 * size.batch + 2 + (size.batch + 1)


@dataclass(frozen=True)
class MemoryStep:
    """Of a memory step, in seconds; `total` includes that the host may be slower."""

    passes: float
    gathers: float
    reduce: float
    scan: float
    total: float
    bytes: float  # of a rank, at the peak


def predict(
    machine: Machine, slots: int, found: Measured, sharded: bool = False, batch: int = MEASURED_BATCH
) -> MemoryStep:
    """A step of `batch` labelled and as many unlabelled samples; the slots are divided as the paper's are.

    `sharded` is of a scan that does not exist. That the scan's time grows with the batch as the number of its
    dependent steps does is too little where there are many: each walks what the earlier ones wrote.
    """
    size, ranks = PAPER.scaled(slots / PAPER.slots)._replace(batch=batch), machine.ranks
    scores = score_bytes(size)
    passed = passes(size, found.copy * machine.bandwidth, machine.float32) / ranks
    header = machine.all_gather(104)
    gathers = machine.all_gather(2 * batch / ranks * (size.key_dim * ITEMSIZE + 8))
    if not sharded:
        gathers += machine.all_gather(scores / ranks)
    reduced = machine.all_reduce(4 * 2 * batch * size.key_dim)
    walkers = ranks if sharded else 1
    as_measured = batch / MEASURED_BATCH * H200_CYCLES / machine.cycles
    scan = as_measured * (found.fixed + found.a_slot * slots / walkers)
    if sharded:
        scan += scan_collectives(size) * machine.all_gather(EXCHANGED)
    # With ranks the gathered scores stand twice, as they came and in order.
    whole = slots * (STATISTICS + found.extra * batch / MEASURED_BATCH) + (scores if ranks > walkers else 0)
    return MemoryStep(
        passed,
        header + gathers,
        reduced,
        scan,
        # The host reads what the header says, and the GPU waits for it.
        header + max(found.host, passed + gathers + scan + reduced),
        slots * size.key_dim * ITEMSIZE / ranks + whole / walkers,
    )


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e9 else f"{size / 1e9:,.1f}"


def two_digits(value: float) -> str:
    return f"{round(value, 2 - len(str(int(value)))):,.0f}"


def memory_steps(found: Measured) -> str:
    rows = []
    for machine in (ONE, *MANY):
        for power in POWERS:
            replicated, sharded = (predict(machine, 10**power, found, sharded) for sharded in (False, True))
            parts = map(milliseconds, (replicated.passes, replicated.gathers, replicated.reduce, replicated.scan))
            totals = [
                text
                for step in (replicated, sharded)
                for text in (
                    milliseconds(step.total) if step.bytes <= machine.memory else "does not fit",
                    gigabytes(step.bytes),
                )
            ]
            rows.append([machine.name, f"10^{power}", *parts, *totals])
    titles = ("slots", "passes", "gathers", "all-reduce", "scan", "step", "GB", "step, scan sharded", "GB")
    return table(["GPUs", *titles], rows)


def sharded_scans(found: Measured) -> str:
    """From how many slots on a sharded scan pays: both sides are linear in them."""
    rows = []
    for machine in MANY:
        others, start = 1 - 1 / machine.ranks, machine.all_gather(0)
        exchange = scan_collectives(PAPER) * machine.all_gather(EXCHANGED)
        gathered = (machine.all_gather(score_bytes(PAPER) / machine.ranks) - start) / PAPER.slots
        scans = (
            found.a_slot * H200_CYCLES / machine.cycles,
            2 * found.extra / (found.copy * machine.bandwidth),
        )
        most = (machine.memory / (predict(machine, 10**7, found, sharded).bytes / 10**7) for sharded in (False, True))
        rows.append(
            [
                machine.name,
                f"{machine.all_gather(EXCHANGED) * 1e6:.0f}",
                milliseconds(exchange),
                *(two_digits((exchange - start) / (scan * others + gathered)) for scan in scans),
                *map(two_digits, most),
            ]
        )
    titles = ("us a collective", "ms a step", "pays from", "from, a scan as fast as its bytes", "most slots", "sharded")
    return table(["GPUs", *titles], rows)


def iterations(found: Measured) -> str:
    """What ranks tell each other in an iteration beside what the memory does, and two steps of the memory."""
    gradients = 4 * parameters(CLASSES)
    rows = []
    for machine in MANY:
        added = machine.all_reduce(gradients)
        each = 16 / machine.ranks  # labelled images of S and of S~ on a rank
        passed = machine.all_gather(48) + 2 * machine.all_gather(8 * (CLASSES + 1) * each)
        memory = (2 * predict(machine, PAPER.slots, found, batch=16 * scale).total for scale in (1, machine.ranks))
        times = (SUMS[1] * added, SUMS[2] * added, machine.all_reduce(4 * STATISTICS_OF_RESNET50), passed, *memory)
        rows.append([machine.name, *map(milliseconds, times)])
    titles = ("gradients, order 1", "order 2", "batch norm", "counts, logits", "memory, 64 images", "memory, 64 a rank")
    return table(["GPUs", *titles], rows)


def measured_iterations() -> str:
    rows = json.loads((MEASURED / "iteration.json").read_text())["rows"]
    seconds = {
        (row["contender"], row["order"]): row["seconds"]["median"] for row in rows if row["backbone"] == "updated"
    }
    found = [milliseconds(seconds[key]) for key in (("plain", None), ("dan", 1), ("dan", 2))]
    return table(["measured", "plain", "order 1", "order 2"], [["one H200, 64 images", *found]])


def tables() -> list[str]:
    found = measured()
    return [coefficients(found), memory_steps(found), sharded_scans(found), measured_iterations(), iterations(found)]


if __name__ == "__main__":
    print("\n".join(tables()))
