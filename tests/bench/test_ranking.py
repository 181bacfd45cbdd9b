"""The benchmark of the ranking: what disagrees is said and has no ratio; figures are written down."""

import numpy as np
import pytest
import torch

from dan_fast import _extension
from dan_fast.bench import ranking
from dan_fast.bench.ranking import COUNTING, DISTANCES, FEATURES, PRODUCT, SORTING, RankingBenchmark
from dan_fast.bench.rows import WHOLE, Row, Timing
from dan_fast.evaluation import RankingResult, evaluate_ranking, rank_distances
from dan_fast.evaluation.pairs import Labels
from tests.bench import measured, tiny, written


def test_the_problem_is_neither_solved_nor_hopeless():
    size = ranking.MARKET1501._replace(queries=200, gallery=2000)
    query, gallery, labels = ranking.make_ranking_problem(size, torch.device("cpu"))
    result = evaluate_ranking(query, gallery, *labels)
    assert 0.02 < result.mAP < 0.9 and result.num_valid > 100
    assert query.dtype == torch.float32 and (query == 0).any() and (query >= 0).all()
    assert (labels.gallery_ids == 0).any() and (labels.query_ids > 0).all()


def test_sorting_by_hand():
    labels = Labels(*map(np.array, ([1, 3], [1, 1, 1, 0, 2], [1, 1], [2, 3, 1, 1, 1])))
    result = ranking.rank_by_sorting(lambda rows: np.array([[0.5, 0.3, 0.1, 0.4, 0.2]] * 2)[rows], labels, max_rank=5)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert (result.mAP, result.mINP, result.num_valid) == (pytest.approx(0.5), 0.5, 1)


@pytest.mark.slow
def test_without_the_extension_pytorch_counts_and_agrees():
    with _extension.disabled():
        rows = measured("ranking")
    assert all(row.disagrees is None for row in rows) and rows[0].of["path"] == "PyTorch"


@pytest.mark.gpu
def test_a_gpu_agrees():
    rows = measured("ranking", device="cuda")
    assert all(row.disagrees is None for row in rows)
    assert rows[0].of["path"] == "PyTorch"


def test_a_difference_is_named():
    result = RankingResult(torch.tensor([0.5, 1.0], dtype=torch.float64), 0.75, 0.5, 4)
    assert ranking.difference(result, result) is None
    assert ranking.difference(result._replace(mAP=0.75 + 1e-13), result) is None
    for field, value, sentence in (
        ("cmc", torch.tensor([0.5, np.nextafter(1.0, 0)], dtype=torch.float64), "CMC in 1 of 2 places"),
        ("cmc", torch.ones(1, dtype=torch.float64), "shape of CMC"),
        ("mAP", 0.75 + 1e-11, "mAP by 1.0e-11 (allowed 1.0e-12)"),
        ("mINP", float("nan"), "mINP by nan (allowed 1.0e-12)"),
        ("num_valid", 5, "num_valid 5 for 4"),
    ):
        assert ranking.difference(result._replace(**{field: value}), result) == sentence


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, tmp_path):
    def wrong(*arguments):
        result = rank_distances(*arguments)
        return result._replace(mAP=result.mAP * 1.01)

    monkeypatch.setattr(ranking, "rank_distances", wrong)
    content = written("ranking", tmp_path, printed=("given distances: disagrees with sorting: mAP by",))
    rows = content["rows"]
    assert rows[0]["disagrees"].startswith("mAP by") and rows[0]["seconds"]
    assert content["speedup"][DISTANCES][SORTING] is None and content["speedup"][FEATURES][SORTING] > 0


def bars(given=0.4, counted=1.0, product=0.8, extra=2e8, plan=None, **fields):
    seconds = {(COUNTING, DISTANCES): given, (COUNTING, FEATURES): counted, (PRODUCT, FEATURES): product}
    rows = [Row(name, {"source": source}, seconds={WHOLE: Timing([value])}, **fields)
            for (name, source), value in seconds.items()]  # fmt: skip
    benchmark = plan or RankingBenchmark(device="cpu")
    benchmark.set_ratios(rows)
    benchmark._extra_bytes = extra
    return benchmark.bars(rows)


def test_bars():
    benchmark = RankingBenchmark(device="cpu")
    assert benchmark.size == ranking.MARKET1501 and benchmark.memory_size == ranking.MSMT17
    assert [bar.value for bar in bars()] == [0.4, 1.25, 200]
    assert [bar.verdict for bar in bars()] == ["met", "met", "met"]
    assert [bar.verdict for bar in bars(given=0.6, counted=1.1, extra=301e6)] == ["NOT met"] * 3
    for useless in ({"disagrees": "CMC", "extra": None}, {"plan": tiny("ranking")}):
        assert [bar.verdict for bar in bars(**useless)] == ["not measured"] * 3


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path):
    printed = ("sorting in NumPy", "matrix product", "features: agrees", "memory at 200 x 4000", "Bars", "torch")
    content = written("ranking", tmp_path, printed=printed)
    assert content["environment"]["threads"] == 1 and content["settings"]["size"] == tiny("ranking").size._asdict()
    of_distances, of_features = (COUNTING, SORTING), (COUNTING, PRODUCT, SORTING)
    expected = [*((DISTANCES, name) for name in of_distances), *((FEATURES, name) for name in of_features)]
    assert [(row["source"], row["contender"]) for row in content["rows"]] == expected
    assert all(row["disagrees"] is None for row in content["rows"]) and len(content["bars"]) == 3
    assert content["memory_seconds"] > 0 and (content["extra_bytes"] is None or content["extra_bytes"] >= 0)
    assert content["speedup"][DISTANCES].keys() == {SORTING}
    assert content["speedup"][FEATURES].keys() == {PRODUCT, SORTING}
