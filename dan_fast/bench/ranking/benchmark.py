"""`dan-fast bench ranking`: a ranking by counting beside one by sorting, from distances and from features."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from dan_fast import _extension
from dan_fast.bench.benchmark import Benchmark
from dan_fast.bench.machine import peak_above
from dan_fast.bench.ranking.problem import (
    MARKET1501,
    MSMT17,
    TOLERANCE,
    RankingSize,
    difference,
    make_ranking_problem,
    rank_by_sorting,
)
from dan_fast.bench.rows import WHOLE, Row, set_speedups, shown
from dan_fast.bench.timing import Say, Turn, repetitions, take_turns
from dan_fast.bench.verdict import Bar, at_most
from dan_fast.evaluation import RankingResult, counting, evaluate_ranking, rank_distances
from dan_fast.evaluation.pairs import Labels

DISTANCES, FEATURES = "given distances", "features"
COUNTING, SORTING, PRODUCT = "dan_fast", "sorting in NumPy", "matrix product"

_DISTANCES_SECONDS, _PRODUCT_FACTOR, _EXTRA_MEGABYTES = 0.5, 1.3, 300


def ranking_path(device: torch.device) -> str:
    """By what a ranking on this device counts."""
    compiled = device.type == "cpu" and _extension.enabled() and not isinstance(counting.load(), str)
    return "C++ kernels" if compiled else "PyTorch"


def set_ranking_speedups(rows: Sequence[Row]) -> None:
    """Of counting, against the others from the same source."""

    def rivals(row: Row) -> dict[str, list[Row]]:
        others = [other for other in rows if other.of["source"] == row.of["source"]]
        return {other.contender: [other] for other in others if row.contender == COUNTING}

    set_speedups(rows, rivals)


@dataclass(kw_only=True)
class RankingBenchmark(Benchmark):
    """Time the evaluation of a ranking beside one that sorts, after checking that both give the same figures.

    Args:
        queries: Images that are searched for (Market-1501: 3368).
        gallery: Images that are searched in (Market-1501: 15913).
        width: Numbers of a feature (ResNet-50: 2048).
        ids: Persons, the distractors' common identity among them.
        cams: Cameras, two at least.
        memory_queries: Queries of the run whose memory is measured (MSMT17: 11659).
        memory_gallery: Gallery images of that run (MSMT17: 82161).
        memory_width: Numbers of a feature in that run; features are not counted.
        repeat: Repetitions of each contender.
        budget_s: Seconds that a contender may take in all its repetitions, one at least.
    """

    name: ClassVar[str] = "ranking"
    columns: ClassVar[tuple[str, ...]] = ("source", "path")
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "of one evaluation: CMC, mAP and mINP; repetitions of the contenders in turn, after one of each",
        "given distances": "float32, 1 - cos",
        "features": "float32; the matrix product is PyTorch's, in float32, and ranks nothing; sorting forms float64",
        "model_bytes": "to read the distances, or the features; flop: of the matrix product of the features",
        "agreement": f"with sorting: CMC in every bit, mAP and mINP within {TOLERANCE:g}",
        "speedup": "median of the other / median of dan_fast; none without agreement",
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
    repeat: PositiveInt = 7
    budget_s: PositiveFloat = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.size = RankingSize(self.queries, self.gallery, self.width, max(2, self.ids), max(2, self.cams))
        self.memory_size = RankingSize(self.memory_queries, self.memory_gallery, self.memory_width, *MSMT17[3:])
        # How far memory rose in the run at `memory_size`, and what that took; None where nothing tells.
        self._extra_bytes: int | None = None
        self._memory_seconds: float | None = None

    def groups(self, say: Say) -> Iterator[list[Row]]:
        rows = [*self._compare_distances(say), *self._compare_features(say)]
        set_ranking_speedups(rows)
        say("memory")
        problem = make_ranking_problem(self.memory_size, self.place)
        few = Labels(*(part[:64] for part in problem.labels))
        few = few._replace(gallery_ids=few.query_ids, gallery_cams=few.query_cams + 1)
        evaluate_ranking(problem.query[:64], problem.gallery[:64], *few)
        begin = time.perf_counter()
        _, self._extra_bytes = peak_above(
            self.place, lambda: evaluate_ranking(problem.query, problem.gallery, *problem.labels)
        )
        self._memory_seconds = time.perf_counter() - begin
        yield rows

    def _compare_distances(self, say: Say) -> list[Row]:
        problem = make_ranking_problem(self.size, self.place)
        query, gallery = (torch.nn.functional.normalize(features) for features in problem[:2])
        distances, labels = 1 - query @ gallery.T, problem.labels
        del query, gallery, problem
        matrix = distances.cpu().numpy()
        runs = {
            COUNTING: lambda: rank_distances(distances, *labels),
            SORTING: lambda: rank_by_sorting(lambda rows: matrix[rows], labels),
        }
        return self._run_in_turn(DISTANCES, runs, say)

    def _compare_features(self, say: Say) -> list[Row]:
        query, gallery, labels = make_ranking_problem(self.size, self.place)

        def sort() -> RankingResult:
            q, g = (each.cpu().numpy().astype(np.float64) for each in (query, gallery))
            q, g = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (q, g))
            return rank_by_sorting(lambda rows: np.ldexp(np.rint(np.ldexp(1 - q[rows] @ g.T, 40)), -40), labels)

        runs = {
            COUNTING: lambda: evaluate_ranking(query, gallery, *labels),
            PRODUCT: lambda: query @ gallery.T,
            SORTING: sort,
        }
        return self._run_in_turn(FEATURES, runs, say)

    def _run_in_turn(self, source: str, runs: dict[str, Callable[[], Any]], say: Say) -> list[Row]:
        rows, turns, results = {}, [], {}
        for contender, run in runs.items():
            say(f"{source}: {contender}")
            of = {"source": source, "path": ranking_path(self.place) if contender == COUNTING else ""}
            rows[contender] = Row(contender, of, (WHOLE,), source, **self._needed(source))
            begin = time.perf_counter()
            results[contender] = run()
            count = repetitions(time.perf_counter() - begin, self.repeat, self.budget_s)
            turns.append(Turn(rows[contender], WHOLE, run, count))
        rows[COUNTING].compared_with = "sorting"
        rows[COUNTING].agreement = f" (CMC in every bit, mAP and mINP within {TOLERANCE:g})"
        rows[COUNTING].disagrees = difference(results[COUNTING], results[SORTING])
        results.clear()
        take_turns(self.place, turns, say, rows[COUNTING].model_bytes[WHOLE], torch.float32)
        return list(rows.values())

    def _needed(self, source: str) -> dict[str, Any]:
        """What an evaluation cannot do without: to read what is given and, from features, to multiply it."""
        queries, gallery, width, *_ = self.size
        if source == DISTANCES:
            return {"model_bytes": {WHOLE: 4 * queries * gallery}}
        return {"model_bytes": {WHOLE: 4 * (queries + gallery) * width}, "flop": {WHOLE: 2 * queries * gallery * width}}

    def title(self, rows: Sequence[Row]) -> str:
        return f"{self.size.queries} queries x {self.size.gallery} gallery images, {self.size.width} wide"

    def legend(self, rows: Sequence[Row]) -> list[str]:
        size = self.memory_size
        return [
            *super().legend(rows),
            f"memory at {size.queries} x {size.gallery}, {size.width} wide: {shown(self._extra_bytes, '.1f', 1e6)} MB "
            f"beyond the features, in {self._memory_seconds:.1f} s ({self.peak_meaning})",
        ]

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        ratios: dict[str, dict[str, float | None]] = {DISTANCES: {}, FEATURES: {}}
        counted = {row.of["source"]: row for row in rows if row.contender == COUNTING}
        for row in rows:
            if row.contender != COUNTING:
                ratios[row.of["source"]][row.contender] = counted[row.of["source"]].ratio(row.contender)
        return {"speedup": ratios, "extra_bytes": self._extra_bytes, "memory_seconds": self._memory_seconds}

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """At the sizes for which they were said."""
        size, memory_size = self.size, self.memory_size
        counted = {row.of["source"]: row for row in rows if row.contender == COUNTING and not row.disagrees}
        given = ratio = extra = None
        if DISTANCES in counted and size[:2] == MARKET1501[:2]:
            given = counted[DISTANCES].whole.median
        if FEATURES in counted and size[:3] == MARKET1501[:3]:
            ratio = 1 / counted[FEATURES].ratio(PRODUCT)
        if self._extra_bytes is not None and memory_size[:2] == MSMT17[:2]:
            extra = self._extra_bytes / 1e6
        shape, memory_shape = (f"{x.queries} x {x.gallery}" for x in (size, memory_size))
        product_name = f"time from features {size.width} wide, {shape}, over the bare matrix product's"
        memory_name = f"memory in MB beyond the features, {memory_shape}, {memory_size.width} wide"
        return [
            at_most(f"seconds from a given matrix, {shape}", f"at most {_DISTANCES_SECONDS} s", _DISTANCES_SECONDS,
                    given),
            at_most(product_name, f"at most {_PRODUCT_FACTOR} times", _PRODUCT_FACTOR, ratio),
            at_most(memory_name, f"at most {_EXTRA_MEGABYTES} MB", _EXTRA_MEGABYTES, extra),
        ]  # fmt: skip
