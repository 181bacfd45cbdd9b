"""`dan-fast bench ranking`: a ranking by counting beside one by sorting, from distances and from features."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from dan_fast import _extension
from dan_fast.bench.agreement import compare_tensors, too_large
from dan_fast.bench.benchmark import Bar, Benchmark, at_most
from dan_fast.bench.machine import peak_above
from dan_fast.bench.rows import WHOLE, Row, shown
from dan_fast.bench.timing import Say, repetitions, take_turns
from dan_fast.evaluation import RankingResult, counting, evaluate_ranking, rank_distances
from dan_fast.evaluation.pairs import Labels

DISTANCES, FEATURES = "given distances", "features"
COUNTING, SORTING, PRODUCT = "dan_fast", "sorting in NumPy", "matrix product"
TOLERANCE = 1e-12
# Lists that are sorted at a time: NumPy's sort of one is as long as its matrix allows.
_SORTED_ROWS = 64


class RankingSize(NamedTuple):
    """Images of an evaluation, the numbers of a feature, identities and cameras."""

    queries: int
    gallery: int
    width: int
    ids: int
    cams: int


MARKET1501 = RankingSize(3368, 15913, 2048, 751, 6)
MSMT17 = RankingSize(11659, 82161, 64, 3060, 15)


def make_ranking_problem(size: RankingSize, device: torch.device) -> tuple[Tensor, Tensor, Labels]:
    """Noisy features of `ids` people as an embedding leaves them, no number below 0, and their labels; always the same.

    Every tenth gallery image is a distractor.

    Returns:
        Queries (q, width), gallery (g, width), and the labels of both.
    """
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
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
    return query.to(device), gallery.to(device), labels


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
    """What of a result differs: the means by more than TOLERANCE, all else in any bit; None if nothing does."""
    errors = {name: abs(getattr(found, name) - getattr(expected, name)) for name in ("mAP", "mINP")}
    parts = too_large(errors, dict.fromkeys(errors, TOLERANCE))
    if found.num_valid != expected.num_valid:
        parts.append(f"num_valid {found.num_valid} for {expected.num_valid}")
    return compare_tensors([("CMC", found.cmc, expected.cmc, None)], different=parts).disagrees


@dataclass(kw_only=True)
class RankingBenchmark(Benchmark):
    """Time the evaluation of a ranking beside one that sorts, after checking that both give the same figures.

    Args:
        queries: Query images (Market-1501: 3368).
        gallery: Gallery images (Market-1501: 15913).
        width: Length of a feature (ResNet-50: 2048).
        ids: Persons, including the common identity of the distractors.
        cams: Cameras, at least two.
        memory_queries: Queries of the run whose memory is measured (MSMT17: 11659).
        memory_gallery: Gallery images of that run (MSMT17: 82161).
        memory_width: Length of a feature in that run; the memory does not include features.
        budget_s: Seconds that all repetitions of a contender, at least one, may take together.
    """

    name: ClassVar[str] = "ranking"
    columns: ClassVar[tuple[str, ...]] = ("source", "path")
    against: ClassVar[tuple[str, ...]] = (PRODUCT, SORTING)
    within: ClassVar[tuple[str, ...]] = ("source",)
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "of one evaluation: CMC, mAP and mINP; repetitions of the contenders in turn, after one of each",
        "given distances": "float32, 1 - cos",
        "features": "float32; the matrix product is PyTorch's, in float32, and ranks nothing; sorting forms float64",
        "model_bytes": "to read the distances, or the features; flop: of the matrix product of the features",
        "agreement": f"with sorting: CMC in every bit, mAP and mINP within {TOLERANCE:g}",
        "extra_bytes": "as peak_bytes, of an evaluation of `memory_size`; the features were there before",
    }

    queries: PositiveInt = MARKET1501.queries
    gallery: PositiveInt = MARKET1501.gallery
    width: PositiveInt = MARKET1501.width
    ids: PositiveInt = MARKET1501.ids
    cams: PositiveInt = MARKET1501.cams
    memory_queries: PositiveInt = MSMT17.queries
    memory_gallery: PositiveInt = MSMT17.gallery
    memory_width: PositiveInt = MSMT17.width
    budget_s: PositiveFloat = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = RankingSize(self.queries, self.gallery, self.width, max(2, self.ids), max(2, self.cams))
        self.memory_size = RankingSize(self.memory_queries, self.memory_gallery, self.memory_width, *MSMT17[3:])
        # How far memory rose in the run at `memory_size`, and what that took; None where nothing tells.
        self._extra_bytes: int | None = None
        self._memory_seconds: float | None = None

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        rows = self._compare(say)
        say("memory")
        query, gallery, labels = make_ranking_problem(self.memory_size, self.place)
        ids, cams = labels.query_ids[:64], labels.query_cams[:64]
        evaluate_ranking(query[:64], gallery[:64], ids, ids, cams, cams + 1)
        begin = time.perf_counter()
        _, self._extra_bytes = peak_above(self.place, lambda: evaluate_ranking(query, gallery, *labels))
        self._memory_seconds = time.perf_counter() - begin
        size = self.size
        yield f"{size.queries} queries x {size.gallery} gallery images, {size.width} wide", rows

    def _compare(self, say: Say) -> list[Row]:
        query, gallery, labels = make_ranking_problem(self.size, self.place)
        distances = 1 - F.normalize(query) @ F.normalize(gallery).T
        matrix = distances.cpu().numpy()

        def sort() -> RankingResult:
            q, g = (each.cpu().numpy().astype(np.float64) for each in (query, gallery))
            q, g = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (q, g))
            return rank_by_sorting(lambda rows: np.ldexp(np.rint(np.ldexp(1 - q[rows] @ g.T, 40)), -40), labels)

        runs = {
            (DISTANCES, COUNTING): lambda: rank_distances(distances, *labels),
            (DISTANCES, SORTING): lambda: rank_by_sorting(lambda rows: matrix[rows], labels),
            (FEATURES, COUNTING): lambda: evaluate_ranking(query, gallery, *labels),
            (FEATURES, PRODUCT): lambda: query @ gallery.T,
            (FEATURES, SORTING): sort,
        }
        # What an evaluation cannot do without: to read what is given and, from features, to multiply it.
        read = {DISTANCES: distances.nbytes, FEATURES: query.nbytes + gallery.nbytes}
        flop = {DISTANCES: {}, FEATURES: {WHOLE: 2 * distances.numel() * self.size.width}}
        compiled = self.place.type == "cpu" and _extension.enabled() and not isinstance(counting.load(), str)
        path, rows, results = "C++ kernels" if compiled else "PyTorch", {}, {}
        for (source, contender), run in runs.items():
            say(f"{source}: {contender}")
            of = {"source": source, "path": path if contender == COUNTING else ""}
            row = Row(contender, of, (WHOLE,), source, model_bytes={WHOLE: read[source]}, flop=flop[source])
            begin = time.perf_counter()
            results[source, contender] = run()
            row.calls = {WHOLE: (run, repetitions(time.perf_counter() - begin, self.repeat, self.budget_s))}
            rows[source, contender] = row
        for source in (DISTANCES, FEATURES):
            row = rows[source, COUNTING]
            row.compared_with, row.agreement = "sorting", f" (CMC in every bit, mAP and mINP within {TOLERANCE:g})"
            row.disagrees = difference(results[source, COUNTING], results[source, SORTING])
        results.clear()
        take_turns(self.place, [*rows.values()], say, max(read.values()), torch.float32)
        return [*rows.values()]

    def legend(self) -> list[str]:
        size = self.memory_size
        return [
            *super().legend(),
            f"memory at {size.queries} x {size.gallery}, {size.width} wide: {shown(self._extra_bytes, '.1f', 1e6)} MB "
            f"beyond the features, in {self._memory_seconds:.1f} s ({self.peak_meaning})",
        ]

    def rivals(self, row: Row, rows: Sequence[Row]) -> dict[str, list[Row]]:
        return super().rivals(row, rows) if row.contender == COUNTING else {}

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        ratios = {DISTANCES: {}, FEATURES: {}}
        counted = {row.of["source"]: row for row in rows if row.contender == COUNTING}
        for row in rows:
            if row.contender != COUNTING:
                source = row.of["source"]
                ratios[source][row.contender] = counted[source].ratio(row.contender)
        return {"speedup": ratios, "extra_bytes": self._extra_bytes, "memory_seconds": self._memory_seconds}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """At the sizes for which they were said."""
        size, memory = self.size, self.memory_size
        counted = {row.of["source"]: row for row in rows if row.contender == COUNTING and not row.disagrees}
        given = ratio = extra = None
        if DISTANCES in counted and size[:2] == MARKET1501[:2]:
            given = counted[DISTANCES].whole.median
        if FEATURES in counted and size[:3] == MARKET1501[:3]:
            ratio = counted[FEATURES].over(PRODUCT)
        if self._extra_bytes is not None and memory[:2] == MSMT17[:2]:
            extra = self._extra_bytes / 1e6
        shape, memory_shape = (f"{x.queries} x {x.gallery}" for x in (size, memory))
        return [
            at_most(f"seconds from a given matrix, {shape}", 0.5, given, "s"),
            at_most(f"time from features {size.width} wide, {shape}, over the bare matrix product's", 1.3, ratio),
            at_most(f"memory in MB beyond the features, {memory_shape}, {memory.width} wide", 300, extra, "MB"),
        ]
