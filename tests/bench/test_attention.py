"""The benchmark of the attention head: the contenders agree, and what disagrees or does not fit is said, not timed."""

from functools import partial

import pytest
import torch

from dan_fast import _extension, functional
from dan_fast.bench import attention as heads
from dan_fast.bench import timing
from dan_fast.bench.attention import (
    COMPILED,
    EAGER,
    KERNELS,
    REFERENCE,
    AttentionBenchmark,
    HeadRunner,
    MapSize,
    row_of,
)
from dan_fast.bench.benchmark import Bar
from dan_fast.bench.machine import cache_flush
from dan_fast.bench.rows import BACKWARD, FORWARD, Row, Timing
from tests.bench import changed, measured, written

TINY = MapSize(batch=3, channels=24, height=3, width=2, reduction=2, classes=5)


def measure(*contenders: str, **settings) -> list[Row]:
    given = {"contenders": ",".join(contenders), "dtype": "float32", "layout": "contiguous"}
    return measured("attention", **given | settings)


@pytest.mark.parametrize("layout", heads.LAYOUTS)
@pytest.mark.parametrize("dtype", heads.TOLERANCES)
@pytest.mark.parametrize("contender", [REFERENCE, EAGER, KERNELS])
def test_contenders_agree_with_the_reference(contender, dtype, layout):
    problem = heads.make_head_problem(TINY, dtype, layout, "cpu")
    assert problem.features.is_contiguous(memory_format=heads.LAYOUTS[layout])
    agreement = heads.compare_heads(heads.start(contender, problem).run(True), heads.reference_outcome(problem), dtype)
    assert agreement.disagrees is None
    assert "gradient of cam_weight" in agreement.errors and len(agreement.errors) == 5 + 8


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree_on_a_gpu(dtype):
    rows = measure(EAGER, KERNELS, dtype=dtype, layout="channels_last", device="cuda")
    assert all(row.disagrees is None and row.seconds and row.bandwidth > 0 for row in rows)


def test_the_problem_has_both_kinds_of_samples_and_slopes_that_reach_every_weight():
    problem = heads.make_head_problem(TINY, torch.float64, "contiguous", "cpu")
    assert set((problem.labels >= 0).tolist()) == {True, False}
    assert all(gradient.abs().max() > 0 for gradient in heads.reference_outcome(problem).gradients)


PLANTED = {
    "adversary_loss": ("results.adversary_loss", torch.neg),
    "spatial_attention": ("results.spatial_attention", lambda x: x.roll(1, 1)),
    "attended": ("results.attended", lambda x: x * torch.nan),
    "pooled": ("results.pooled", lambda x: x[:-1]),
    "gradient of features": ("gradients.0", lambda x: x * 1.01),
    "gradient of cam_weight": ("gradients.7", lambda x: x * 1.001),
    "gradient of ws3": ("gradients.4", torch.neg),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_named(what, dtype):
    problem = heads.make_head_problem(TINY, dtype, "contiguous", "cpu")
    outcome = changed(heads.start(EAGER, problem).run(True), *PLANTED[what])
    disagrees = heads.compare_heads(outcome, heads.reference_outcome(problem), dtype).disagrees
    assert disagrees is not None and disagrees.startswith(f"{what} by") and ";" not in disagrees


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, tmp_path):
    head = functional.attention_head

    def wrong(*arguments):
        result = head(*arguments)
        # In the package's own path only: with the extension disabled it is the other contender.
        return result if _extension._disabled else result._replace(attended=result.attended * 1.01)

    monkeypatch.setattr(functional, "attention_head", wrong)
    words = ("kernels: disagrees with the reference: attended by",)
    flags = ("--dtype", "float32", "--layout", "contiguous")
    eager, kernels = written("attention", tmp_path, *flags, printed=words)["rows"]
    assert eager["disagrees"] is None and kernels["seconds"]
    assert eager["speedup"] == kernels["speedup"] == {}


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path):
    printed = ("kernels", "copy bandwidth", "Bars", "agrees with the reference")
    content = written("attention", tmp_path, "--threads", "1", printed=printed)
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
        assert row["returned_bytes"] > row["model_bytes"][FORWARD]
        if row["contender"] == KERNELS:
            assert bool(row["operators"]) != ("no kernel ran" in row["notes"])
            assert row["speedup"][EAGER].keys() == {FORWARD, BACKWARD}
        else:
            assert row["operators"] == []


def test_a_compile_that_takes_too_long_is_left_out():
    (row,) = measure(COMPILED, compile_budget_s=0.1)
    assert row.left_out[FORWARD] == "torch.compile took more than 0 s" and not row.seconds and not row.speedup


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr("dan_fast.core.free_memory.free_memory", lambda device: 1)
    (row,) = measure(EAGER)
    assert not row.seconds and row.left_out[BACKWARD].startswith("the comparison would need about")


def test_without_kernels_the_row_says_so():
    with _extension.disabled():
        eager, kernels = measure(EAGER, KERNELS, repeat=1)
    assert kernels.notes == ["no kernel ran"] and kernels.speedup[EAGER][FORWARD] > 0
    assert {bar.verdict for bar in bars([eager, kernels])} == {"not measured"}


def row(contender: str, forward: float, backward: float, **fields) -> Row:
    of = {"dtype": "float32", "layout": "contiguous", "size": MapSize(), "itemsize": 4}
    fields.setdefault("operators", ["attention_head"] if contender == KERNELS else [])
    return row_of(contender, of, seconds={FORWARD: Timing([forward]), BACKWARD: Timing([backward])}, **fields)


def some_rows(**fields) -> list[Row]:
    values = {"peak_bytes": 34_000_000, "returned_bytes": 30_000_000, "bandwidth": 20e9} | fields
    rows = [row(EAGER, 1.0, 9.0), row(COMPILED, 0.5, 3.5), row(KERNELS, 0.1, 1.0, **values)]
    AttentionBenchmark(device="cpu").set_ratios(rows)
    return rows


def bars(rows: list[Row], *layouts: str, device: str = "cpu") -> list[Bar]:
    benchmark = AttentionBenchmark(device="cpu", layout=",".join(layouts or ["contiguous"]))
    benchmark.place = torch.device(device)
    return benchmark.bars(rows)


def test_bars():
    assert [bar.verdict for bar in bars(some_rows())] == ["met"] * 3
    slow = some_rows(peak_bytes=35_100_000)
    slow[0].seconds[BACKWARD] = Timing([7.9])
    AttentionBenchmark(device="cpu").set_ratios(slow)
    assert [bar.verdict for bar in bars(slow)] == ["NOT met", "met", "NOT met"]
    for useless in ({"operators": []}, {"disagrees": "attended"}):
        assert {bar.verdict for bar in bars(some_rows(**useless))} == {"not measured"}
    assert len(bars(some_rows(), *heads.LAYOUTS)) == 6


def test_the_bar_of_a_gpu():
    rows = some_rows()
    assert rows[2].model_bytes == {FORWARD: 64 * 2048 * 49 * 4, BACKWARD: 77070336}
    assert row_of(KERNELS, rows[2].of | {"itemsize": 2}).model_bytes[BACKWARD] == 77070336 // 2
    # 77.07 MB at 20 GB/s are 3.85 ms.
    rows[2].seconds[BACKWARD] = Timing([7.7e-3])
    (bar,) = bars(rows, device="cuda")
    assert bar.met and bar.value == pytest.approx(7.7e-3 / (77.070336e6 / 20e9))
    rows[2].seconds[BACKWARD] = Timing([7.8e-3])
    assert not bars(rows, device="cuda")[0].met


def test_caches_are_emptied_by_writing_all_of_a_buffer():
    flush = cache_flush(torch.device("cpu"))
    buffer = flush().fill_(1)
    assert buffer.nbytes >= 2**20 and flush() is buffer and not buffer.any()


@pytest.mark.slow
def test_each_is_timed_after_a_run_of_its_own_and_with_empty_caches(monkeypatch):
    events, run = [], HeadRunner.run
    monkeypatch.setattr(HeadRunner, "run", lambda *of: (events.append(of), run(*of))[1])
    monkeypatch.setattr(timing, "cache_flush", lambda device: partial(events.append, "flush"))
    measure(EAGER, KERNELS)
    at = [i for i, event in enumerate(events) if event == "flush"]
    # In each of two rounds: the copy, and two contenders each way.
    assert len(at) == 2 * (1 + 4) and sum(events[i - 1] == events[i + 1] for i in at) == 2 * 4
