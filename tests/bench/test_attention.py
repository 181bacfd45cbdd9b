"""The benchmark of the attention head: the contenders agree, and what disagrees or does not fit is said, not timed."""

import json

import pytest
import torch

from dan_fast import _extension, functional
from dan_fast.bench import attention
from dan_fast.bench.attention import HeadGroup, HeadPlan, HeadRow, head_bars, head_bytes, set_head_speedups
from dan_fast.bench.attention_contenders import (
    COMPILED,
    EAGER,
    KERNELS,
    LAYOUTS,
    REFERENCE,
    TOLERANCES,
    HeadOutcome,
    HeadRunner,
    MapSize,
    compare_heads,
    make_head_problem,
    reference_outcome,
    start,
)
from dan_fast.bench.machine import CacheFlush
from dan_fast.bench.timing import BACKWARD, FORWARD, Timing, repetitions, rounds
from dan_fast.cli import main

TINY = MapSize(batch=3, channels=24, height=3, width=2, reduction=2, classes=5)


def tiny_command(*arguments: str) -> list[str]:
    size = {"batch": 3, "channels": 24, "height": 3, "width": 2, "reduction": 2, "classes": 5, "repeat": 2}
    flags = [word for name, value in size.items() for word in (f"--{name}", str(value))]
    return ["bench", "attention", "--device", "cpu", *flags, "--contenders", "eager,kernels", *arguments]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("contender", [REFERENCE, EAGER, KERNELS])
def test_contenders_agree_with_the_reference(contender, dtype, layout):
    problem = make_head_problem(TINY, dtype, layout, "cpu")
    assert problem.features.is_contiguous(memory_format=LAYOUTS[layout])
    agreement = compare_heads(start(contender, problem).outcome(), reference_outcome(problem), dtype)
    assert agreement.disagrees is None
    assert "gradient of cam_weight" in agreement.errors and len(agreement.errors) == 5 + 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_agree_on_a_gpu(dtype):
    plan = HeadPlan([EAGER, KERNELS], torch.device("cuda"), TINY, repeat=2)
    rows = HeadGroup(plan, dtype, "channels_last").measure()
    assert all(row.disagrees is None and row.seconds and row.bandwidth > 0 for row in rows)


def test_the_problem_has_both_kinds_of_samples_and_slopes_that_reach_every_weight():
    problem = make_head_problem(TINY, torch.float64, "contiguous", "cpu")
    assert set((problem.labels >= 0).tolist()) == {True, False}
    assert all(gradient.abs().max() > 0 for gradient in reference_outcome(problem).gradients)


PLANTED = {
    "adversary_loss": lambda o: (o.results._replace(adversary_loss=-o.results.adversary_loss), o.gradients),
    "spatial_attention": lambda o: (
        o.results._replace(spatial_attention=o.results.spatial_attention.roll(1, 1)),
        o.gradients,
    ),
    "attended": lambda o: (o.results._replace(attended=o.results.attended * torch.nan), o.gradients),
    "pooled": lambda o: (o.results._replace(pooled=o.results.pooled[:-1]), o.gradients),
    "gradient of features": lambda o: (o.results, (o.gradients[0] * 1.01, *o.gradients[1:])),
    "gradient of cam_weight": lambda o: (o.results, (*o.gradients[:-1], o.gradients[-1] * 1.001)),
    "gradient of ws3": lambda o: (o.results, (*o.gradients[:4], -o.gradients[4], *o.gradients[5:])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_named(what, dtype):
    problem = make_head_problem(TINY, dtype, "contiguous", "cpu")
    expected = reference_outcome(problem)
    disagrees = compare_heads(HeadOutcome(*PLANTED[what](start(EAGER, problem).outcome())), expected, dtype).disagrees
    assert disagrees is not None and disagrees.startswith(f"{what} by") and ";" not in disagrees


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, capsys, tmp_path):
    head = functional.attention_head

    def wrong(*arguments):
        result = head(*arguments)
        # In the package's own path only: with the extension disabled it is the other contender.
        return result if _extension._disabled else result._replace(attended=result.attended * 1.01)

    monkeypatch.setattr(functional, "attention_head", wrong)
    out = tmp_path / "figures.json"
    assert main(tiny_command("--dtype", "float32", "--layout", "contiguous", "--json", str(out))) == 0
    assert "kernels: disagrees with the reference: attended by" in capsys.readouterr().out
    eager, kernels = json.loads(out.read_text())["rows"]
    assert eager["disagrees"] is None and kernels["seconds"]
    assert eager["speedup"] == kernels["speedup"] == {}


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert main(tiny_command("--threads", "1", "--json", str(out))) == 0
    content = json.loads(out.read_text())
    assert (content["schema"], content["benchmark"], content["complete"]) == (1, "attention", True)
    assert {"torch", "commit", "cpu", "threads", "date", "gpu", "driver"} <= content["environment"].keys()
    assert content["settings"]["layout"] == ["contiguous", "channels_last"]
    assert content["tolerances"].keys() == {"float32", "bfloat16"}
    assert [(row["contender"], row["dtype"], row["layout"]) for row in content["rows"]] == [
        (contender, dtype, layout)
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last")
        for contender in (EAGER, KERNELS)
    ]
    for row in content["rows"]:
        assert row["disagrees"] is None and row["left_out"] is None
        assert row["seconds"].keys() == {FORWARD, BACKWARD} == row["bandwidth_share"].keys()
        for timing in row["seconds"].values():
            assert timing["repeats"] == len(timing["all"]) == 2
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]
        assert row["extra_bytes"] is None or row["extra_bytes"] >= 0
        assert row["returned_bytes"] > row["model_bytes"][FORWARD]
        if row["contender"] == KERNELS:
            assert bool(row["operators"]) != ("no kernel ran" in row["notes"])
            assert row["speedup"][EAGER].keys() == {FORWARD, BACKWARD}
        else:
            assert row["operators"] == []
    printed = capsys.readouterr().out
    for part in ("kernels", "copy bandwidth", "Bars", "agrees with the reference"):
        assert part in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--dtype", "int8"], 1, "dtype: 'int8'"),
        (["--layout", "rows"], 1, "layout: 'rows' is not one of contiguous, channels_last"),
        (["--contenders", "fastest"], 1, "contenders: 'fastest'"),
        (["--repeat", "0"], 2, '"repeat"'),
        (["--height", "0"], 2, '"height"'),
        (["--threads", "-1"], 2, '"threads"'),
        (["--device", "mps"], 1, "mps"),
        (["--json", "/proc/none/x.json"], 1, "/proc/none/x.json"),
        (["--contenders", "eager", "--dtype", "float32", "--check", "true"], 1, "6 of 6 bars are missed"),
    ],
)
def test_a_mistake_names_the_option(arguments, code, sentence, capsys):
    assert main(tiny_command(*arguments)) == code
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors


def test_a_compile_that_takes_too_long_is_left_out():
    (row,) = HeadGroup(HeadPlan([COMPILED], size=TINY, compile_budget_s=0.1), torch.float32, "contiguous").measure()
    assert row.left_out == "torch.compile took more than 0 s" and not row.seconds and not row.speedup


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(attention, "free_memory", lambda device: 1)
    (row,) = HeadGroup(HeadPlan([EAGER], size=TINY), torch.float32, "contiguous").measure()
    assert "1" not in row.seconds and row.left_out.startswith("the comparison would need about")


def test_without_kernels_the_row_says_so(monkeypatch):
    with _extension.disabled():
        eager, kernels = HeadGroup(
            HeadPlan([EAGER, KERNELS], size=TINY, repeat=1), torch.float32, "contiguous"
        ).measure()
    assert kernels.notes == ["no kernel ran"] and kernels.speedup[EAGER][FORWARD] > 0
    assert {bar.verdict for bar in head_bars([eager, kernels], ["contiguous"], "cpu")} == {"not measured"}


def row(contender: str, forward: float, backward: float, **fields) -> HeadRow:
    seconds = {FORWARD: Timing([forward]), BACKWARD: Timing([backward])}
    values = {"layout": "contiguous", "operators": ["attention_head"] if contender == KERNELS else []} | fields
    return HeadRow(contender, "float32", size=MapSize(), itemsize=4, seconds=seconds, **values)


def some_rows(**fields) -> list[HeadRow]:
    values = {"peak_bytes": 34_000_000, "returned_bytes": 30_000_000, "bandwidth": 20e9} | fields
    rows = [row(EAGER, 1.0, 9.0), row(COMPILED, 0.5, 3.5), row(KERNELS, 0.1, 1.0, **values)]
    set_head_speedups(rows)
    return rows


def test_ratios():
    eager, compiled, kernels = some_rows()
    assert kernels.speedup == {
        EAGER: {FORWARD: pytest.approx(10), BACKWARD: 9.0},
        COMPILED: {FORWARD: pytest.approx(5), BACKWARD: 3.5},
    }
    assert eager.speedup.keys() == {COMPILED} and compiled.speedup[EAGER][FORWARD] == 2.0
    for wrong in (0, 2):
        rows = some_rows()
        rows[wrong].disagrees = "attended"
        set_head_speedups(rows)
        assert rows[wrong].speedup == {} and EAGER not in rows[2].speedup


def test_bars():
    assert [bar.verdict for bar in head_bars(some_rows(), ["contiguous"], "cpu")] == ["met"] * 3
    assert [bar.met for bar in head_bars(some_rows(peak_bytes=35_000_000), ["contiguous"], "cpu")] == [
        True,
        True,
        False,
    ]
    slow = some_rows()
    slow[0].seconds[BACKWARD] = Timing([7.9])
    set_head_speedups(slow)
    assert [bar.verdict for bar in head_bars(slow, ["contiguous"], "cpu")] == ["NOT met", "met", "met"]
    for useless in ({"operators": []}, {"disagrees": "attended"}):
        verdicts = {bar.verdict for bar in head_bars(some_rows(**useless), ["contiguous"], "cpu")}
        assert verdicts == {"not measured"}
    assert len(head_bars(some_rows(), list(LAYOUTS), "cpu")) == 6


def test_the_bar_of_a_gpu():
    rows = some_rows()
    # 77.07 MB at 20 GB/s are 3.85 ms.
    rows[2].seconds[BACKWARD] = Timing([7.7e-3])
    (bar,) = head_bars(rows, ["contiguous"], "cuda")
    assert bar.met and bar.value == pytest.approx(7.7e-3 / (77.070336e6 / 20e9))
    rows[2].seconds[BACKWARD] = Timing([7.8e-3])
    assert not head_bars(rows, ["contiguous"], "cuda")[0].met


def test_bytes():
    assert head_bytes(MapSize(), 2, FORWARD) == 64 * 2048 * 49 * 2
    assert head_bytes(MapSize(), 4, BACKWARD) == 3 * 64 * 2048 * 49 * 4


def test_each_is_timed_after_a_run_of_its_own_and_with_empty_caches(monkeypatch):
    events, run, flush = [], HeadRunner.run, CacheFlush.__call__
    assert CacheFlush(torch.device("cpu")).buffer.nbytes >= 2**20
    monkeypatch.setattr(HeadRunner, "run", lambda *of: (events.append(of), run(*of))[1])
    monkeypatch.setattr(CacheFlush, "__call__", lambda self: (events.append("flush"), flush(self))[1])
    HeadGroup(HeadPlan([EAGER, KERNELS], torch.device("cpu"), TINY, repeat=2), torch.float32, "contiguous").measure()
    at = [i for i, event in enumerate(events) if event == "flush"]
    # In each of two rounds: the copy, and two contenders each way.
    assert len(at) == 2 * (1 + 4) and sum(events[i - 1] == events[i + 1] for i in at) == 2 * 4


def test_turns():
    assert repetitions({"fast": 1.0, "slow": 40.0, "none": 0.0}, 5, 10.0) == {"fast": 5, "slow": 1, "none": 5}
    order = list(rounds({"a": 3, "b": 1, "c": 3}))
    assert order == [["a", "b", "c"], ["c", "a"], ["a", "c"]] and list(rounds({})) == []
