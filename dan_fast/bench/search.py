"""`dan-fast bench search`: comparing all of a million features, HNSW and IVF-PQ, beside the evaluation's ranking."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from jsonargparse.typing import PositiveFloat, PositiveInt

from dan_fast.bench.benchmark import LEGEND, Bar, Benchmark, at_least, at_most, contenders_of
from dan_fast.bench.machine import resident_peak
from dan_fast.bench.rows import WHOLE, Row, shown
from dan_fast.bench.timing import Say, repetitions, take_turns
from dan_fast.core.errors import DanFastError
from dan_fast.evaluation import evaluate_ranking, pairwise_distances
from dan_fast.evaluation.pairs import Labels
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
_IMAGES_A_PERSON, _CAMERAS = 20, 6
# The exponents by which the variances of directions fall off, among persons and among the images of one; the variance
# of an image beside that of a person, and how much it varies (log-normal); the threshold below which numbers are 0.
# Chosen so that the cosines within and between persons, and the intrinsic dimension of neighbourhoods, are those of an
# EfficientNet-Lite0 on Market-1501's test images: see docs/search.md.
_PERSONS, _IMAGES, _NOISE, _SPREAD, _THRESHOLD = 0.65, 0.58, 0.39, 0.48, 1.22
# Rows drawn at a time.
_CHUNK = 65536


def make_search_problem(file: Path, features: int, queries: int, width: int) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Draws persons of 20 images each on average, and writes the gallery's features into a file, chunk by chunk.

    Returns:
        Features of length 1, of the queries and of the gallery, which are mapped from the file, and their labels.

    Example:
        >>> import tempfile
        >>> query, gallery, labels = make_search_problem(Path(tempfile.mkdtemp()) / "features", 100, 8, 32)
        >>> gallery.shape, bool(np.allclose(np.linalg.norm(query, axis=1), 1))
        ((100, 32), True)
    """
    random = np.random.default_rng(0)
    persons, deviations = max(2, features // _IMAGES_A_PERSON), []
    for exponent in (_PERSONS, _IMAGES):
        # Along the axes, in no order; their squares are 1 on average.
        variances = np.arange(1, width + 1) ** -exponent
        deviations.append(np.sqrt(random.permutation(variances / variances.mean())).astype(np.float32))
    centres = deviations[0] * random.standard_normal((persons, width), dtype=np.float32) - np.float32(_THRESHOLD)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = random.integers(0, persons, count)
        scale = np.sqrt(_NOISE * np.exp(_SPREAD * random.standard_normal((count, 1)))).astype(np.float32)
        drawn = random.standard_normal((count, width), dtype=np.float32) * deviations[1] * scale + centres[ids]
        drawn = np.maximum(drawn, 0, out=drawn)
        # One that is 0 everywhere would have no length.
        drawn[:, 0] += 1e-6
        return drawn / np.linalg.norm(drawn, axis=1, keepdims=True), ids

    gallery_ids = []
    with file.open("wb") as stream:
        for first in range(0, features, _CHUNK):
            drawn, ids = draw(min(_CHUNK, features - first))
            stream.write(drawn.data)
            gallery_ids.append(ids)
    query, query_ids = draw(queries)
    # Copied where it is written to, which nothing does: PyTorch warns of arrays that cannot be.
    gallery = np.memmap(file, dtype=np.float32, mode="c", shape=(features, width))
    gallery_cams, query_cams = (random.integers(0, _CAMERAS, count) for count in (features, queries))
    return query, gallery, Labels(query_ids, np.concatenate(gallery_ids), query_cams, gallery_cams)


@dataclass(kw_only=True)
class SearchBenchmark(Benchmark):
    """Build indexes of many features and search them, beside the exact search and the exact ranking.

    Args:
        features: Gallery images that are searched.
        width: Length of a feature.
        queries: Queries per search.
        contenders: Some of flat, hnsw, ivfpq and "exact ranking", separated by commas, or all; flat is always included.
        budget_s: Seconds that all repetitions of a contender's searches, at least one, may take together.
    """

    name: ClassVar[str] = "search"
    against: ClassVar[tuple[str, ...]] = (FLAT, EVALUATION)
    meaning: ClassVar[dict[str, str]] = {
        "seconds": "to search for all queries at once, their exact distances and order included; in turn",
        "drawn": f"persons of {_IMAGES_A_PERSON} images on average; a person is a centre, an image that and noise of "
        "its own strength, queries are further images of the same persons; variances fall off as powers, negative "
        "numbers are 0, rows have length 1; cosines and intrinsic dimension are fitted to those of a trained network "
        "on Market-1501",
        "flat": "all features are compared in float32, by PyTorch, from the mapped file; the order is by float64",
        "exact ranking": "evaluate_ranking: CMC, mAP and mINP of the queries, in float64; it gives no lists",
        "agreement": f"of flat: the lists of {_CHECKED} queries are those of the evaluation's distances",
        "model_bytes": "of flat: to read the features; flop: of their matrix product with the queries",
        "recall": f"share of the {_AT} nearest by the exact search that are among the {_AT} found",
        "build_seconds": "from the features in the file to an index in its file; drawing and embedding are not in it",
        "disk_bytes": "of the index beside the features, which take feature_bytes; flat needs no more than these",
        "resident_peak_bytes": "highest resident memory of the process in the whole run (VmHWM), pages of the mapped "
        "features included",
    }

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

    def groups(self, say: Say) -> Iterator[tuple[str, list[Row]]]:
        faiss = kinds.faiss_library()
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            with TemporaryDirectory() as folder:
                say("drawing features")
                file = Path(folder) / "features.f32"
                problem = make_search_problem(file, self.features, self.queries, self.width)
                title = f"{self.queries} queries at a time in {self.features} features, {self.width} wide"
                yield title, self._measure(*problem, Path(folder), say)
        finally:
            faiss.omp_set_num_threads(before)

    def _measure(self, query: np.ndarray, gallery: np.ndarray, labels: Labels, folder: Path, say: Say) -> list[Row]:
        features, order, rows, nearest = torch.from_numpy(np.asarray(gallery)), np.arange(len(gallery)), [], None
        for kind in self.kinds:
            row = Row(kind, {"build_seconds": None, "disk_bytes": None, "recall": None}, (WHOLE,))
            rows.append(row)
            if kind == EVALUATION:
                call = partial(evaluate_ranking, torch.from_numpy(query), features, *labels)
            else:
                say(f"{kind}: building")
                index = None if kind == FLAT else _index(kind, gallery, folder / f"{kind}.faiss", row)
                call = partial(Searcher(gallery, order, kind, index).search, query, _AT)
            say(f"{kind}: searching")
            begin = time.perf_counter()
            found = call()
            row.calls = {WHOLE: (call, repetitions(time.perf_counter() - begin, self.repeat, self.budget_s))}
            if kind == FLAT:
                nearest, row.of["disk_bytes"] = found.rows, 0
                row.model_bytes, row.flop = {WHOLE: gallery.nbytes}, {WHOLE: 2 * self.queries * gallery.size}
                row.compared_with, row.agreement = "the exact ranking", f" in the lists of {_CHECKED} queries"
                some = torch.from_numpy(query[:_CHECKED])
                distances = torch.cat([pairwise_distances(some, part) for part in features.split(_CHUNK)], dim=1)
                expected = distances.argsort(dim=1, stable=True)[:, :_AT].numpy()
                wrong = int((expected != nearest[:_CHECKED]).sum())
                row.disagrees = f"{wrong} of {expected.size} places" if wrong else None
            if kind != EVALUATION:
                row.of["recall"] = recall(found.rows, nearest)
        take_turns(self.place, rows, say, min(gallery.nbytes, _COPIED), torch.float32)
        self._peak = resident_peak()
        return rows

    def figures(self, row: Row) -> dict[str, Any]:
        return {"queries_per_second": self.queries / row.whole.median}

    def cells(self, row: Row) -> dict[str, str]:
        return {
            "queries/s": shown(self.figures(row)["queries_per_second"], ".4g"),
            f"recall@{_AT}": shown(row.of["recall"], ".4f"),
            "build s": shown(row.of["build_seconds"], ".1f"),
            "disk MB": shown(row.of["disk_bytes"], ".1f", 1e6),
        }

    def more(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {"resident_peak_bytes": self._peak, "feature_bytes": 4 * self.features * self.width}

    def legend(self) -> list[str]:
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
            at_least(f"recall@{_AT} of hnsw", _RECALL, hit, unit=""),
            at_least("queries/s of hnsw over those of the exact search", _FASTER, faster),
            at_most("highest resident memory in GB", _GIGABYTES, peak, "GB"),
        ]


def _index(kind: str, gallery: np.ndarray, path: Path, row: Row) -> Any:
    """faiss's index as it is read from the file that it was written into."""
    begin = time.perf_counter()
    index, row.of["parameters"] = kinds.build(kind, gallery)
    kinds.write(index, path)
    row.of["build_seconds"] = time.perf_counter() - begin
    row.of["disk_bytes"] = os.path.getsize(path)
    # Not both in memory.
    del index
    return kinds.read(path, *gallery.shape)
