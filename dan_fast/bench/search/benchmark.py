"""Searching in a million features: by comparing all, by HNSW and by IVF-PQ, beside the ranking of the evaluation."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from dan_fast.bench.benchmark import LEGEND, Bar, Benchmark, at_least, at_most, contenders_of
from dan_fast.bench.machine import resident_peak
from dan_fast.bench.rows import WHOLE, Row, shown
from dan_fast.bench.search.problem import IMAGES_A_PERSON, SearchProblem, make_search_problem
from dan_fast.bench.timing import Say, Turn, repetitions, take_turns
from dan_fast.core.errors import DanFastError
from dan_fast.evaluation import evaluate_ranking, pairwise_distances
from dan_fast.search import kinds
from dan_fast.search.searcher import Searcher, recall

FLAT, EVALUATION = "flat", "exact ranking"
CONTENDERS = (FLAT, "hnsw", "ivfpq", EVALUATION)
_AT = 10
_MILLION = 1_000_000
_RECALL, _FASTER, _GIGABYTES = 0.98, 10, 8
# Queries whose lists are compared with the distances of the evaluation, in all places.
_CHECKED = 4
# Bytes of the copy by which the bandwidth is measured: more than caches hold, and little beside the features.
_COPIED = 2**27


@dataclass(kw_only=True)
class SearchBenchmark(Benchmark):
    """Build indexes of many features and search them, beside the exact search and the exact ranking.

    Args:
        features: Images that are searched in.
        width: Numbers of a feature.
        queries: Queries that are searched for at a time.
        contenders: Some of flat, hnsw, ivfpq and "exact ranking", with commas between, or all; flat is always there.
        budget_s: Seconds that a contender's searches may take in all its repetitions, one at least.
    """

    name: ClassVar[str] = "search"
    against: ClassVar[tuple[str, ...]] = (FLAT, EVALUATION)
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "to search for all queries at once, their exact distances and order included; in turn",
        "drawn": (
            f"persons of {IMAGES_A_PERSON} images on average; a person is a centre, an image that and noise of its own "
            "strength, queries are further images of the same persons; variances fall off as powers, negative numbers "
            "are 0, rows have length 1; cosines and intrinsic dimension are fitted to those of a trained network on "
            "Market-1501"
        ),
        "flat": "all features are compared in float32, by PyTorch, from the mapped file; the order is by float64",
        "exact ranking": "evaluate_ranking: CMC, mAP and mINP of the queries, in float64; it gives no lists",
        "agreement": f"of flat: the lists of {_CHECKED} queries are those of the evaluation's distances",
        "model_bytes": "of flat: to read the features; flop: of their matrix product with the queries",
        "recall": f"share of the {_AT} nearest by the exact search that are among the {_AT} found",
        "build_seconds": "from the features in the file to an index in its file; drawing and embedding are not in it",
        "disk_bytes": "of the index beside the features, which take feature_bytes; flat needs no more than these",
        "resident_peak_bytes": "highest resident memory of the process in the whole run (VmHWM), pages of the mapped "
        "features included",
    }  # fmt: skip

    # Nothing of it runs on a GPU.
    device: str = "cpu"
    features: PositiveInt = _MILLION
    width: PositiveInt = 512
    queries: PositiveInt = 500
    contenders: str = "all"
    repeat: PositiveInt = 5
    budget_s: PositiveFloat = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.place.type != "cpu":
            raise DanFastError("The search runs on the CPU: --device cpu.")
        if self.features < _AT:
            raise DanFastError(f"features is {self.features}: at least {_AT} are searched for.")
        chosen = contenders_of(self.contenders, CONTENDERS)
        self.kinds = [name for name in CONTENDERS if name in chosen or name == FLAT]
        self._peak: int | None = None

    def groups(self, say: Say) -> Iterator[list[Row]]:
        faiss = kinds.faiss_library()
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            with tempfile.TemporaryDirectory() as folder:
                say("drawing features")
                file = Path(folder) / "features.f32"
                problem = make_search_problem(file, self.features, self.queries, self.width)
                yield self._measure(problem, Path(folder), say)
        finally:
            faiss.omp_set_num_threads(before)

    def _measure(self, problem: SearchProblem, folder: Path, say: Say) -> list[Row]:
        order = np.arange(len(problem.gallery))
        rows, turns, nearest = {}, [], None
        for kind in self.kinds:
            say(f"{kind}: building")
            row = rows[kind] = Row(kind, {"build_seconds": None, "disk_bytes": None, "recall": None}, (WHOLE,))
            if kind == EVALUATION:
                gallery, query = torch.from_numpy(np.asarray(problem.gallery)), torch.from_numpy(problem.query)
                labels = problem.query_ids, problem.gallery_ids, problem.query_cams, problem.gallery_cams
                call = partial(evaluate_ranking, query, gallery, *labels)
            else:
                searcher = Searcher(problem.gallery, order, kind, self._index(kind, problem, folder, row))
                call = partial(searcher.search, problem.query, _AT)
            say(f"{kind}: searching")
            begin = time.perf_counter()
            found = call()
            count = repetitions(time.perf_counter() - begin, self.repeat, self.budget_s)
            turns.append(Turn(row, WHOLE, call, count))
            if kind == FLAT:
                nearest = found.rows
                row.model_bytes, row.flop = (
                    {WHOLE: problem.gallery.nbytes},
                    {WHOLE: 2 * self.queries * problem.gallery.size},
                )
                row.compared_with, row.agreement = "the exact ranking", f" in the lists of {_CHECKED} queries"
                row.disagrees = _difference(problem, nearest)
            if kind != EVALUATION:
                row.of["recall"] = recall(found.rows, nearest)
        take_turns(self.place, turns, say, min(problem.gallery.nbytes, _COPIED), torch.float32)
        self._peak = resident_peak()
        return list(rows.values())

    def _index(self, kind: str, problem: SearchProblem, folder: Path, row: Row) -> Any:
        """faiss's index as it is read from the file that it was written into; None where there is none."""
        if kind == FLAT:
            row.of["disk_bytes"] = 0
            return None
        begin, path = time.perf_counter(), folder / f"{kind}.faiss"
        index, row.of["parameters"] = kinds.build(kind, problem.gallery)
        kinds.write(index, path)
        row.of["build_seconds"] = time.perf_counter() - begin
        row.of["disk_bytes"] = os.path.getsize(path)
        # Not both in memory.
        del index
        return kinds.read(path, *problem.gallery.shape)

    def title(self, rows: Sequence[Row]) -> str:
        return f"{self.queries} queries at a time in {self.features} features, {self.width} wide"

    def figures(self, row: Row) -> dict[str, Any]:
        return {"queries_per_second": None if row.whole is None else self.queries / row.whole.median}

    def cells(self, row: Row) -> dict[str, str]:
        return {
            "queries/s": shown(self.figures(row)["queries_per_second"], ".4g"),
            f"recall@{_AT}": shown(row.of["recall"], ".4f"),
            "build s": shown(row.of["build_seconds"], ".1f"),
            "disk MB": shown(row.of["disk_bytes"], ".1f", 1e6),
        }

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"resident_peak_bytes": self._peak, "feature_bytes": 4 * self.features * self.width}

    def legend(self, rows: Sequence[Row]) -> list[str]:
        return [
            f"ms: median (quartiles, repetitions) of a search for {self.queries} queries. vs: how many times as long "
            "that one takes.",
            LEGEND[1],
            f"disk MB: beside {4 * self.features * self.width / 1e6:.1f} MB of features. Highest resident memory of "
            f"the run: {shown(self._peak, '.2f', 1e9)} GB.",
        ]

    def bars(self, rows: Sequence[Row]) -> list[Bar]:
        """At the size for which they were said."""
        found = {row.contender: row for row in rows if not row.disagrees}
        hit = faster = peak = None
        if (self.features, self.width) == (_MILLION, 512) and {FLAT, "hnsw"} <= found.keys():
            hit, faster = found["hnsw"].of["recall"], found["hnsw"].ratio(FLAT)
            peak = None if self._peak is None else self._peak / 1e9
        return [
            Bar(f"recall@{_AT} of hnsw", f"at least {_RECALL}", hit, hit is not None and hit >= _RECALL),
            at_least("queries/s of hnsw over those of the exact search", _FASTER, faster),
            at_most("highest resident memory in GB", _GIGABYTES, peak, "GB"),
        ]


def _difference(problem: SearchProblem, nearest: np.ndarray) -> str | None:
    """In how many places lists differ from those of the evaluation's distances, in words; None if in none."""
    query, gallery = torch.from_numpy(problem.query[:_CHECKED]), torch.from_numpy(np.asarray(problem.gallery))
    distances = torch.cat([pairwise_distances(query, part) for part in gallery.split(65536)], dim=1)
    expected = distances.argsort(dim=1, stable=True)[:, :_AT].numpy()
    wrong = int((expected != nearest[:_CHECKED]).sum())
    return f"{wrong} of {expected.size} places" if wrong else None
