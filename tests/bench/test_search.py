"""The benchmark of the search: what it draws, that a wrong index has another recall, and its bars."""

import numpy as np
import pytest

from dan_fast.bench.rows import WHOLE, Row, Timing
from dan_fast.bench.search import CONTENDERS, EVALUATION, FLAT, SearchBenchmark, make_search_problem
from dan_fast.search import kinds
from tests.bench import measured, written


def test_features_are_distributed_as_those_of_a_network(tmp_path):
    query, gallery, labels = make_search_problem(tmp_path / "features", 4000, 400, 512)
    assert np.allclose(np.linalg.norm(gallery, axis=1), 1) and (gallery >= 0).all()
    assert len(np.unique(labels.gallery_ids)) == 200
    cosines = query @ gallery.T
    same = labels.query_ids[:, None] == labels.gallery_ids
    # Of an EfficientNet-Lite0 on Market-1501: 5, 50 and 95 % within persons; 1, 50, 99 % between them.
    assert np.abs(np.percentile(cosines[same], (5, 50, 95)) - (0.31, 0.66, 0.88)).max() < 0.15
    assert np.abs(np.percentile(cosines[~same], (1, 50, 99)) - (0.02, 0.11, 0.48)).max() < 0.06
    again = make_search_problem(tmp_path / "again", 4000, 400, 512)
    assert np.array_equal(again[1], gallery) and np.array_equal(again[0], query)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_the_command_writes_everything_down(tmp_path, monkeypatch, wrong):
    if wrong:
        search = kinds.search
        monkeypatch.setattr(kinds, "search", lambda *arguments: (search(*arguments) + 1) % 2000)
    printed = ("flat: agrees with the exact ranking", "Highest resident memory", "not measured", "recall@10")
    content = written("search", tmp_path, printed=printed)
    rows = {row["contender"]: row for row in content["rows"]}
    assert tuple(rows) == CONTENDERS and rows[FLAT]["disagrees"] is None and rows[FLAT]["recall"] == 1
    assert rows[FLAT]["speedup"].keys() == {EVALUATION}
    for name in ("hnsw", "ivfpq"):
        assert (rows[name]["recall"] > 0.9) != wrong
        assert rows[name]["build_seconds"] > 0 and rows[name]["disk_bytes"] > 10_000 and rows[name]["parameters"]
        assert rows[name]["queries_per_second"] == pytest.approx(50 / rows[name]["seconds"]["median"])
        assert rows[name]["speedup"].keys() == {FLAT, EVALUATION}
    assert rows[FLAT]["flop"] == {WHOLE: 2 * 50 * 2000 * 32} and rows[FLAT]["over_limit"][WHOLE] > 0
    assert rows["hnsw"]["over_limit"] == {WHOLE: None}, "which is to leave out what flat has to do"
    assert content["feature_bytes"] == 4 * 2000 * 32 and content["resident_peak_bytes"] > 10**8


@pytest.mark.slow
def test_what_the_exact_search_gets_wrong_is_said(monkeypatch):
    monkeypatch.setattr(
        "dan_fast.search.searcher.search_exactly", lambda *a: (np.zeros((50, 10)), np.ones((50, 10), int))
    )
    assert measured("search", contenders="flat")[0].disagrees.endswith(" of 40 places")


def test_bars():
    def verdicts(hit=0.99, seconds=0.05, peak=7e9, **settings) -> list[str]:
        rows = [Row(FLAT, {}), Row("hnsw", {"recall": hit}, speedup={FLAT: {WHOLE: 0.5 / seconds}})]
        rows[1].seconds = {WHOLE: Timing([seconds])}
        benchmark = SearchBenchmark(device="cpu", **settings)
        benchmark._peak = peak
        return [bar.verdict for bar in benchmark.bars(rows)]

    assert verdicts() == ["met"] * 3
    assert verdicts(hit=0.979, seconds=0.051, peak=8.1e9) == ["NOT met"] * 3
    assert verdicts(features=10_000) == ["not measured"] * 3
