"""Ranking by counting beside ranking by sorting, in NumPy: agreement first, then times taken in turn."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dan_fast import _extension
from dan_fast.bench.machine import CacheFlush, peak_above
from dan_fast.bench.timing import Timing, once, repetitions, rounds
from dan_fast.bench.verdict import Bar, at_most
from dan_fast.evaluation import RankingResult, counting, evaluate_ranking, rank_distances
from dan_fast.evaluation.pairs import Labels

DISTANCES, FEATURES = "given distances", "features"
COUNTING, SORTING, PRODUCT = "dan_fast", "sorting in NumPy", "matrix product"
TOLERANCE = 1e-12

_DISTANCES_SECONDS, _PRODUCT_FACTOR, _EXTRA_BYTES = 0.5, 1.3, 300e6
# Lists that are sorted at a time: NumPy's sort of one is as long as its matrix allows.
_SORTED_ROWS = 64

Say = Callable[[str], None]


class RankingSize(NamedTuple):
    """Images of an evaluation, the numbers of a feature, identities and cameras."""

    queries: int
    gallery: int
    width: int
    ids: int
    cams: int


MARKET1501 = RankingSize(3368, 15913, 2048, 751, 6)
MSMT17 = RankingSize(11659, 82161, 64, 3060, 15)


@dataclass(frozen=True)
class RankingPlan:
    """What to measure.

    Attributes:
        size: images and features whose ranking is timed.
        memory_size: images and features of the run whose memory is measured.
        device: where features and distances lie.
        repeat: repetitions of each contender.
        budget_s: seconds that a contender may take in all its repetitions, one at least.
    """

    size: RankingSize = MARKET1501
    memory_size: RankingSize = MSMT17
    device: torch.device = torch.device("cpu")
    repeat: int = 7
    budget_s: float = 60.0


@dataclass
class RankingRow:
    """A contender on one kind of input.

    Attributes:
        source: DISTANCES or FEATURES.
        contender: COUNTING, SORTING or PRODUCT.
        path: how it counts: "C++ kernels" or "PyTorch"; "" for the others.
        seconds: of one evaluation.
        disagrees: what differs from sorting, None if nothing does.
    """

    source: str
    contender: str
    path: str = ""
    seconds: Timing = field(default_factory=Timing)
    disagrees: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": self.seconds.to_dict()}


class RankingProblem(NamedTuple):
    """Features of people as an embedding leaves them: no number below 0, half of them 0."""

    query: Tensor
    gallery: Tensor
    labels: Labels


def make_ranking_problem(size: RankingSize, device: torch.device, seed: int = 0) -> RankingProblem:
    """Noisy features of `ids` people, every tenth gallery image a distractor; the same for the same seed."""
    generator, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    labels = Labels(
        random.integers(1, size.ids, size.queries),
        np.where(random.random(size.gallery) < 0.1, 0, random.integers(1, size.ids, size.gallery)),
        random.integers(0, size.cams, size.queries),
        random.integers(0, size.cams, size.gallery),
    )
    people = torch.randn(size.ids, size.width, generator=generator)
    query, gallery = (
        torch.randn(len(ids), size.width, generator=generator).mul_(4).add_(people[torch.from_numpy(ids)]).relu_()
        for ids in (labels.query_ids, labels.gallery_ids)
    )
    return RankingProblem(query.to(device), gallery.to(device), labels)


def rank_by_sorting(rows_of: Callable[[slice], np.ndarray], labels: Labels, max_rank: int = 50) -> RankingResult:
    """What each list is, sorted whole, in NumPy; `rows_of` gives the distances of some queries."""
    cmc, precision, penalty, valid = np.zeros(max_rank, dtype=np.int64), 0.0, 0.0, 0
    for first in range(0, len(labels.query_ids), _SORTED_ROWS):
        block = slice(first, min(first + _SORTED_ROWS, len(labels.query_ids)))
        for query, order in enumerate(np.argsort(rows_of(block), axis=1, kind="stable"), start=first):
            same = labels.gallery_ids[order] == labels.query_ids[query]
            kept = ~(same & (labels.gallery_cams[order] == labels.query_cams[query]))
            ranks = 1 + np.flatnonzero(same[kept])
            if len(ranks):
                cmc[ranks[0] - 1 :] += 1
                precision += float(np.mean(np.arange(1, len(ranks) + 1) / ranks))
                penalty += len(ranks) / float(ranks[-1])
                valid += 1
    return RankingResult(torch.from_numpy(cmc / valid), precision / valid, penalty / valid, valid)


def difference(found: RankingResult, expected: RankingResult) -> str | None:
    """What of a result differs: the CMC in any bit, the means by more than TOLERANCE; None if nothing does."""
    parts = []
    if not torch.equal(found.cmc, expected.cmc):
        parts.append(f"CMC by {(found.cmc - expected.cmc).abs().max():.1e}")
    for name in ("mAP", "mINP"):
        off = abs(getattr(found, name) - getattr(expected, name))
        if not off <= TOLERANCE:
            parts.append(f"{name} by {off:.1e}")
    if found.num_valid != expected.num_valid:
        parts.append(f"num_valid {found.num_valid} for {expected.num_valid}")
    return ", ".join(parts) or None


class RankingMeasurement(NamedTuple):
    """The rows, and how far memory rose in the run at `memory_size`; None where the system cannot tell."""

    rows: list[RankingRow]
    extra_bytes: int | None
    memory_seconds: float


def measure_ranking(plan: RankingPlan, say: Say = lambda _: None) -> RankingMeasurement:
    """Compares, then times all contenders in turn, then measures memory."""
    rows = [*_compare_distances(plan, say), *_compare_features(plan, say)]
    say("memory")
    problem = make_ranking_problem(plan.memory_size, plan.device)
    few = slice(0, 64)
    few_labels = Labels(*(part[few] for part in problem.labels))
    few_labels = few_labels._replace(gallery_ids=few_labels.query_ids, gallery_cams=few_labels.query_cams + 1)
    evaluate_ranking(problem.query[few], problem.gallery[few], *few_labels)
    begin = time.perf_counter()
    _, extra = peak_above(plan.device, lambda: evaluate_ranking(problem.query, problem.gallery, *problem.labels))
    return RankingMeasurement(rows, extra, time.perf_counter() - begin)


def _compare_distances(plan: RankingPlan, say: Say) -> list[RankingRow]:
    problem = make_ranking_problem(plan.size, plan.device)
    unit = [torch.nn.functional.normalize(features) for features in (problem.query, problem.gallery)]
    distances = 1 - unit[0] @ unit[1].T
    labels = problem.labels
    del unit, problem
    matrix = distances.cpu().numpy()
    runs = {
        COUNTING: lambda: rank_distances(distances, *labels),
        SORTING: lambda: rank_by_sorting(lambda rows: matrix[rows], labels),
    }
    return _run_in_turn(plan, DISTANCES, runs, say)


def _compare_features(plan: RankingPlan, say: Say) -> list[RankingRow]:
    query, gallery, labels = make_ranking_problem(plan.size, plan.device)

    def sort() -> RankingResult:
        q, g = query.cpu().numpy().astype(np.float64), gallery.cpu().numpy().astype(np.float64)
        q /= np.linalg.norm(q, axis=1, keepdims=True)
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        return rank_by_sorting(lambda rows: np.ldexp(np.rint(np.ldexp(1 - q[rows] @ g.T, 40)), -40), labels)

    runs = {
        COUNTING: lambda: evaluate_ranking(query, gallery, *labels),
        PRODUCT: lambda: query @ gallery.T,
        SORTING: sort,
    }
    return _run_in_turn(plan, FEATURES, runs, say)


def _run_in_turn(plan: RankingPlan, source: str, runs: dict[str, Callable[[], Any]], say: Say) -> list[RankingRow]:
    rows, first, results = {}, {}, {}
    for contender, run in runs.items():
        say(f"{source}: {contender}")
        path = ranking_path(plan.device) if contender == COUNTING else ""
        rows[contender] = RankingRow(source, contender, path)
        begin = time.perf_counter()
        results[contender] = run()
        first[contender] = time.perf_counter() - begin
    rows[COUNTING].disagrees = difference(results[COUNTING], results[SORTING])
    results.clear()
    flush = CacheFlush(plan.device)
    for number, turn in enumerate(rounds(repetitions(first, plan.repeat, plan.budget_s))):
        say(f"{source}: round {number + 1}")
        gc.collect()
        for contender in turn:
            rows[contender].seconds.seconds.append(once(plan.device, runs[contender], flush))
    return list(rows.values())


def ranking_path(device: torch.device) -> str:
    """By what a ranking on this device counts."""
    compiled = device.type == "cpu" and _extension.enabled() and not isinstance(counting.load(), str)
    return "C++ kernels" if compiled else "PyTorch"


def speedup(rows: Sequence[RankingRow], source: str, rival: str) -> float | None:
    """How many times as long the rival takes; None without agreement."""
    found = {row.contender: row for row in rows if row.source == source}
    if COUNTING not in found or rival not in found or found[COUNTING].disagrees:
        return None
    return found[rival].seconds.median / found[COUNTING].seconds.median


def ranking_bars(plan: RankingPlan, measured: RankingMeasurement) -> list[Bar]:
    """What counting has to reach at the sizes for which it was said; a row that disagrees has no figure."""
    size, memory_size = plan.size, plan.memory_size
    counted = next(row for row in measured.rows if (row.source, row.contender) == (DISTANCES, COUNTING))
    given = None if counted.disagrees or size[:2] != MARKET1501[:2] else counted.seconds.median
    ratio = speedup(measured.rows, FEATURES, PRODUCT) if size[:3] == MARKET1501[:3] else None
    extra = measured.extra_bytes if memory_size[:2] == MSMT17[:2] else None
    shape, memory_shape = (f"{x.queries} x {x.gallery}" for x in (size, memory_size))
    return [
        at_most(f"seconds from a given matrix, {shape}", f"at most {_DISTANCES_SECONDS} s", _DISTANCES_SECONDS, given),
        at_most(
            f"time from features {size.width} wide, {shape}, over the bare matrix product's",
            f"at most {_PRODUCT_FACTOR} times",
            _PRODUCT_FACTOR,
            None if ratio is None else 1 / ratio,
        ),
        at_most(
            f"memory in MB beyond the features, {memory_shape}, {memory_size.width} wide",
            f"at most {_EXTRA_BYTES / 1e6:g} MB",
            _EXTRA_BYTES / 1e6,
            None if extra is None else extra / 1e6,
        ),
    ]
