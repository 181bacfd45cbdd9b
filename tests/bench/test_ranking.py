"""The benchmark of the ranking: what disagrees is said and has no ratio; figures are written down."""

import json

import numpy as np
import pytest
import torch

from dan_fast import _extension
from dan_fast.bench import ranking
from dan_fast.bench.ranking import (
    COUNTING,
    DISTANCES,
    FEATURES,
    MARKET1501,
    MSMT17,
    PRODUCT,
    SORTING,
    RankingMeasurement,
    RankingPlan,
    RankingRow,
    RankingSize,
    difference,
    make_ranking_problem,
    measure_ranking,
    rank_by_sorting,
    ranking_bars,
    ranking_path,
    speedup,
)
from dan_fast.bench.timing import Timing
from dan_fast.cli import main
from dan_fast.evaluation import RankingResult, evaluate_ranking, rank_distances

TINY = RankingSize(70, 300, 16, 20, 3)
PLAN = RankingPlan(TINY, MSMT17._replace(queries=80, gallery=200, width=8), repeat=2)


def tiny_command(*arguments: str) -> list[str]:
    size = {"queries": 70, "gallery": 300, "width": 16, "ids": 20, "cams": 3, "repeat": 2, "threads": 1}
    memory = {"memory_queries": 200, "memory_gallery": 4000, "memory_width": 8}
    flags = [word for name, value in (size | memory).items() for word in (f"--{name}", str(value))]
    return ["bench", "ranking", "--device", "cpu", *flags, *arguments]


def test_the_problem_is_neither_solved_nor_hopeless():
    problem = make_ranking_problem(MARKET1501._replace(queries=200, gallery=2000), torch.device("cpu"))
    result = evaluate_ranking(*problem[:2], *problem.labels)
    assert 0.02 < result.mAP < 0.9 and result.num_valid > 100
    assert problem.query.dtype == torch.float32 and (problem.query == 0).any() and (problem.query >= 0).all()
    assert (problem.labels.gallery_ids == 0).any() and (problem.labels.query_ids > 0).all()


def test_sorting_by_hand():
    labels = ranking.Labels(*map(np.array, ([1, 3], [1, 1, 1, 0, 2], [1, 1], [2, 3, 1, 1, 1])))
    result = rank_by_sorting(lambda rows: np.array([[0.5, 0.3, 0.1, 0.4, 0.2]] * 2)[rows], labels, max_rank=5)
    assert result.cmc.tolist() == [0, 1, 1, 1, 1]
    assert (result.mAP, result.mINP, result.num_valid) == (pytest.approx(0.5), 0.5, 1)


@pytest.mark.slow
def test_all_contenders_are_timed_and_agree():
    rows, extra, seconds = measure_ranking(PLAN)
    assert [(row.source, row.contender) for row in rows] == [
        (DISTANCES, COUNTING),
        (DISTANCES, SORTING),
        (FEATURES, COUNTING),
        (FEATURES, PRODUCT),
        (FEATURES, SORTING),
    ]
    assert all(row.disagrees is None and len(row.seconds.seconds) == 2 for row in rows)
    assert seconds > 0 and (extra is None or extra >= 0)
    with _extension.disabled():
        assert ranking_path(torch.device("cpu")) == "PyTorch"
        assert all(row.disagrees is None for row in measure_ranking(PLAN).rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_agrees():
    rows, extra, _ = measure_ranking(RankingPlan(TINY, PLAN.memory_size, torch.device("cuda"), repeat=2))
    assert all(row.disagrees is None for row in rows) and extra > 0
    assert rows[0].path == "PyTorch"


def test_a_difference_is_named():
    result = RankingResult(torch.tensor([0.5, 1.0], dtype=torch.float64), 0.75, 0.5, 4)
    assert difference(result, result) is None
    assert difference(result._replace(mAP=0.75 + 1e-13), result) is None
    for field, value, sentence in (
        ("cmc", torch.tensor([0.5, np.nextafter(1.0, 0)], dtype=torch.float64), "CMC by 1.1e-16"),
        ("mAP", 0.75 + 1e-11, "mAP by 1.0e-11"),
        ("mINP", float("nan"), "mINP by nan"),
        ("num_valid", 5, "num_valid 5 for 4"),
    ):
        assert difference(result._replace(**{field: value}), result) == sentence


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, capsys):
    def wrong(*arguments):
        result = rank_distances(*arguments)
        return result._replace(mAP=result.mAP * 1.01)

    monkeypatch.setattr(ranking, "rank_distances", wrong)
    rows = measure_ranking(PLAN).rows
    assert rows[0].disagrees.startswith("mAP by") and rows[0].seconds.seconds
    assert speedup(rows, DISTANCES, SORTING) is None and speedup(rows, FEATURES, SORTING) > 0
    assert main(tiny_command()) == 0
    assert "given distances: disagrees with sorting: mAP by" in capsys.readouterr().out


def measured(given=0.4, counted=1.0, product=0.8, extra=2e8, **fields) -> RankingMeasurement:
    seconds = {(DISTANCES, COUNTING): given, (FEATURES, COUNTING): counted, (FEATURES, PRODUCT): product}
    rows = [RankingRow(*key, seconds=Timing([value]), **fields) for key, value in seconds.items()]
    return RankingMeasurement(rows, extra, 1.0)


def test_bars():
    plan = RankingPlan()
    assert plan.size == MARKET1501 and plan.memory_size == MSMT17

    def verdicts(plan=plan, **figures):
        return [bar.verdict for bar in ranking_bars(plan, measured(**figures))]

    assert [bar.value for bar in ranking_bars(plan, measured())] == [0.4, 1.25, 200]
    assert verdicts() == ["met", "met", "met"]
    assert verdicts(given=0.6, counted=1.1, extra=301e6) == ["NOT met"] * 3
    assert verdicts(disagrees="CMC", extra=None) == ["not measured"] * 3
    assert verdicts(PLAN) == ["not measured"] * 3


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(tiny_command("--json", str(out))) == 0
    content = json.loads(out.read_text())
    assert (content["schema"], content["benchmark"], content["complete"]) == (1, "ranking", True)
    assert content["environment"]["threads"] == 1 and content["settings"]["size"] == TINY._asdict()
    assert len(content["rows"]) == 5 and len(content["bars"]) == 3
    for row in content["rows"]:
        timing = row["seconds"]
        assert timing["repeats"] == 2 and 0 < timing["q1"] <= timing["median"] <= timing["q3"]
    assert content["speedup"][DISTANCES].keys() == {SORTING}
    assert content["speedup"][FEATURES].keys() == {PRODUCT, SORTING}
    printed = capsys.readouterr().out
    for part in ("sorting in NumPy", "matrix product", "features: agrees", "memory at 200 x 4000", "Bars", "torch"):
        assert part in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--repeat", "0"], 2, '"repeat"'),
        (["--queries", "0"], 2, '"queries"'),
        (["--device", "mps"], 1, "mps"),
        (["--json", "/proc/none/x.json"], 1, "/proc/none/x.json"),
        (["--check", "true"], 1, "3 of 3 bars are missed"),
    ],
)
def test_a_mistake_names_the_option(arguments, code, sentence, capsys):
    assert main(tiny_command(*arguments)) == code
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors
