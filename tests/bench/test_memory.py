"""The benchmark of the memory step: the contenders agree, and what disagrees or does not fit is said, not timed."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from dan_fast import MemoryState, _extension, functional, reference, triton_kernels
from dan_fast.bench.benchmark import Bar
from dan_fast.bench.machine import environment
from dan_fast.bench.memory import benchmark as memory
from dan_fast.bench.memory.benchmark import predict, row_of
from dan_fast.bench.memory.contenders import (
    COMPILED,
    CONTENDERS,
    IN_PLACE,
    KERNELS,
    LITERAL,
    MODULE,
    SCORE_SPACE,
    STEP,
    TOLERANCES,
    compare,
)
from dan_fast.bench.memory.literal import InPlaceMemory, in_place_step
from dan_fast.bench.memory.problem import Size, make_problem, model_bytes
from dan_fast.bench.rows import BACKWARD, FORWARD, Row, Timing
from dan_fast.bench.timing import Operators
from dan_fast.core.types import Gates, MemoryBatch
from tests.bench import changed, measured, tiny, written

TINY = Size(60, 44, key_dim=24, batch=4)
CPU = torch.device("cpu")
EAGER = [contender for contender in CONTENDERS if contender.name != COMPILED]


def measure(*names: str, **settings) -> list[Row]:
    return measured("memory", contenders=",".join(names), **{"budget_s": 30.0} | settings)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("contender", EAGER[1:], ids=lambda contender: f"{contender.name}-{contender.use}")
def test_contenders_agree_with_the_reference(contender, dtype):
    problem = make_problem(TINY, dtype, CPU, batches=2)
    literal = EAGER[0].start(problem).outcome()
    agreement = compare(contender.start(problem).outcome(), literal, dtype)
    assert agreement.disagrees is None
    if contender.name != "literal_in_place":
        assert "gradient of beta" in agreement.errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contenders_agree_on_a_gpu(dtype):
    rows = measure(*dict.fromkeys(each.name for each in EAGER), device="cuda", dtype=dtype)
    assert all(row.disagrees is None and row.seconds and not row.left_out for row in rows)
    assert all(row.peak_bytes > 0 and row.bandwidth > 0 for row in rows)


def test_the_problem_has_false_samples():
    problem = make_problem(Size(120, 200, key_dim=24, batch=16), torch.float64, CPU)
    beta = EAGER[0].start(problem).outcome().gradients[4]
    assert beta > 0, "the second term of the loss is 0 where FP and FN are empty"


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_the_literal_loop_follows_the_rules_where_it_is_tight(slots):
    """Fewer slots than samples, ties and empty slots, for several steps from an empty memory."""
    generator = torch.Generator().manual_seed(slots)
    states = [MemoryState.empty(slots, 3, torch.float64), MemoryState.empty(slots + 1, 3, torch.float64)]
    memories = [InPlaceMemory(MemoryState(*(x.clone() for x in state))) for state in states]
    for step in range(12):
        keys = torch.randint(-1, 2, (2, 4, 3), generator=generator).double()
        labels = torch.randint(3, (4,), generator=generator)
        batch = (keys[0], labels, keys[1], torch.arange(4) + 4 * step, 0.3, -0.2, 0.4)
        expected = reference.memory_step(*states, *batch)
        found = in_place_step(*memories, MemoryBatch(*batch[:4]), Gates(*batch[4:]))
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        for one, other in zip(found[2:], expected[2:], strict=True):
            for field in MemoryState._fields:
                torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-9, atol=1e-12)
        states = list(expected[2:])


PLANTED = {
    "loss": ("loss", lambda x: x * 1.001),
    "pseudo_labels": ("pseudo_labels", lambda x: x.roll(1)),
    "labeled.least_used": ("labeled.least_used", lambda x: x + 1),
    # As if W^e were forgotten in the write: every slot lacks a small share of a key.
    "unlabeled.features": ("unlabeled.features", lambda x: x * (1 - 1e-2)),
    "labeled.usage": ("labeled.usage", lambda x: x.nan_to_num() + 1e-4),
    "unlabeled.evaluation": ("unlabeled.evaluation", lambda x: x.roll(1)),
    "gradient of keys": ("gradients.0", torch.neg),
    "gradient of beta": ("gradients.4", lambda x: x * torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_named(what, dtype):
    literal = EAGER[0].start(make_problem(TINY, dtype, CPU, batches=1)).outcome()
    assert compare(literal, literal, dtype).disagrees is None
    disagrees = compare(changed(literal, *PLANTED[what]), literal, dtype).disagrees
    assert disagrees is not None and what in disagrees


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, tmp_path):
    step = functional.memory_step
    monkeypatch.setattr(functional, "memory_step", lambda *a, **k: (r := step(*a, **k))._replace(loss=r.loss * 1.01))
    words = ("score_space (step): disagrees with literal_autograd: loss by",)
    flags = ("--contenders", "literal_autograd,literal_in_place,score_space")
    content = written("memory", tmp_path, *flags, printed=words)
    rows = {(row["contender"], row["use"]): row for row in content["rows"]}
    assert rows[SCORE_SPACE, STEP]["speedup"] == {}
    assert "loss" in rows[SCORE_SPACE, STEP]["disagrees"]
    # Neither is it a rival for those that agree.
    assert rows[LITERAL, STEP]["speedup"].keys() == {IN_PLACE}
    assert rows[SCORE_SPACE, MODULE]["speedup"].keys() == {LITERAL, IN_PLACE}


@pytest.mark.slow
def test_without_the_literal_autograd_form_the_other_literal_one_is_compared_too(monkeypatch):
    """A ratio over a form that was compared with nothing would say nothing."""
    monkeypatch.setattr(
        "dan_fast.bench.memory.contenders.in_place_step",
        lambda *given: (step := in_place_step(*given))._replace(loss=step.loss * 1.01),
    )
    in_place, *scores = measure(IN_PLACE, SCORE_SPACE)
    assert in_place.compared_with == SCORE_SPACE and "loss" in in_place.disagrees
    assert scores and not any(row.speedup for row in scores)


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path):
    names = "literal_autograd,literal_in_place,score_space,kernels"
    flags = ("--contenders", names, "--slots_scale", "1,2", "--threads", "1")
    printed = ("literal_in_place", "copy bandwidth", "Bars", "PREDICTION, nothing here was measured")
    content = written("memory", tmp_path, *flags, printed=printed)
    assert content["settings"]["slots_scale"] == [1.0, 2.0]
    assert "prediction" in content["prediction"]["what"]
    assert content["tolerances"].keys() == {"float32"}
    for row in content["rows"]:
        if row["left_out"]:
            assert row["contender"] == KERNELS and not row["seconds"]
            continue
        assert row["disagrees"] is None and row["peak_extra_bytes"] == row["extra_bytes"]
        assert bool(row["operators"]) == (row["contender"] == KERNELS), row["operators"]
        assert all(share > 0 for share in row["bandwidth_share"].values())
    assert {tuple(row["size"].values())[:2] for row in content["rows"]} == {(60, 44), (120, 88)}


def test_what_takes_too_long_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 10)
    rows = measure(LITERAL, SCORE_SPACE, budget_s=1e-6)
    assert all(not row.seconds and not row.speedup for row in rows)
    assert "a run would take about" in rows[0].left_out[FORWARD] and "the budget is" in rows[1].left_out[BACKWARD]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 10)
    monkeypatch.setattr(memory, "foresee", lambda *of: (0.0, 5e9))
    free = 10 * TINY.slots * TINY.key_dim * 4
    monkeypatch.setattr("dan_fast.core.free_memory.free_memory", lambda device: free)
    rows = measure(LITERAL, IN_PLACE, SCORE_SPACE)
    assert rows[0].left_out[FORWARD].startswith("a run would need about 6.0 GB")
    assert rows[2].seconds.keys() == {FORWARD, BACKWARD}
    free = 1
    (row, _) = measure(SCORE_SPACE)
    assert "the memories would need" in row.left_out[FORWARD]


@pytest.mark.slow
def test_repetitions_end_with_the_budget(monkeypatch):
    real = memory.once
    # The first run of each pass decides: half the budget leaves two repetitions.
    monkeypatch.setattr(memory, "once", lambda *a: (real(*a), 15.0)[1])
    rows = measure(SCORE_SPACE, repeat=6)
    assert [len(timing) for row in rows for timing in row.seconds.values()] == [2] * 4


def test_the_estimate_grows_with_the_slots(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 20)
    assert memory.foresee(EAGER[0], TINY.scaled(0.5), torch.float32, CPU) == (0.0, 0.0)
    probed = []
    real = memory.make_problem
    monkeypatch.setattr(memory, "make_problem", lambda size, *a, **k: (probed.append(size), real(size, *a, **k))[1])
    seconds, _ = memory.foresee(EAGER[0], TINY.scaled(100.0), torch.float32, CPU)
    assert seconds > 0 and probed == [Size(20, 15, 24, 4)]


def row(contender: str, use: str, forward: float, backward: float | None, scale: float = 1.0, **fields) -> Row:
    of = {"dtype": "float32", "itemsize": 4, "scale": scale, "size": Size().scaled(scale)}
    seconds = {FORWARD: Timing([forward])} | ({} if backward is None else {BACKWARD: Timing([backward])})
    (found,) = (each for each in CONTENDERS if (each.name, each.use) == (contender, use))
    return row_of(found, of, seconds=seconds, **fields)


def some_rows(peak: int) -> list[Row]:
    rows = [
        row(LITERAL, STEP, 10.0, 35.0),
        row(IN_PLACE, MODULE, 1.0, None),
        row(SCORE_SPACE, STEP, 0.2, 0.4),
        row("score_space_compiled", STEP, 0.1, 0.2),
        row(SCORE_SPACE, MODULE, 0.2, 0.3),
        row(KERNELS, STEP, 0.05, 0.08, peak_bytes=peak + 7, returned_bytes=7, bandwidth=20e9),
        row(KERNELS, MODULE, 0.04, 0.1, peak_bytes=peak, bandwidth=20e9),
    ]
    tiny("memory").set_ratios(rows)
    return rows + [row(KERNELS, use, 1.0, 2.0, scale=16.0) for use in (STEP, MODULE)]


def test_ratios():
    step, module = some_rows(0)[5:7]
    assert step.speedup["literal_autograd"] == {FORWARD: 200.0, BACKWARD: pytest.approx(437.5)}
    assert step.speedup["best_pytorch"] == {FORWARD: pytest.approx(2.0), BACKWARD: pytest.approx(2.5)}
    assert module.speedup["best_pytorch"] == {FORWARD: pytest.approx(5.0), BACKWARD: pytest.approx(3.0)}
    assert module.speedup["literal_in_place"] == {FORWARD: pytest.approx(25.0)}
    rows = some_rows(0)[:7]
    rows[3].disagrees = rows[1].disagrees = "loss"
    tiny("memory").set_ratios(rows)
    step = rows[5]
    assert step.speedup["best_pytorch"][BACKWARD] == pytest.approx(5.0), "the compiled one no longer counts"
    assert "literal_in_place" not in step.speedup and rows[3].speedup == {}


def bars(rows: list[Row], device: str = "cpu") -> dict[str, Bar]:
    benchmark = tiny("memory", batch=32)
    benchmark.place = torch.device(device)
    return {bar.name: bar for bar in benchmark.bars(rows)}


def test_bars():
    verdicts = {name: bar.verdict for name, bar in bars(some_rows(peak=90_000_000)).items()}
    assert verdicts.pop("linear in slots (step)") == "NOT met", "2 / 0.08 is more than 16 x 1.25"
    assert set(verdicts.values()) == {"met"} and len(verdicts) == 8
    assert not bars(some_rows(peak=101_000_000))["peak memory above the memories in MB (module)"].met
    assert {bar.verdict for bar in bars([]).values()} == {"not measured"}
    wrong = some_rows(peak=0)
    wrong[6].disagrees = "loss"
    assert {bar.verdict for name, bar in bars(wrong).items() if "(module)" in name} == {"not measured"}


def test_the_bar_of_a_gpu():
    rows = some_rows(peak=0)
    bar = bars(rows, "cuda")["forward + backward in ms (module)"]
    # 2.5 x 355.83 MB / 20 GB/s + 64 x 4 us = 44.7 ms
    assert bar.limit.startswith("at most 44.7 ms") and bar.value == pytest.approx(100.0) and not bar.met
    rows[6].seconds[BACKWARD] = Timing([0.044])
    assert bars(rows, "cuda")["forward + backward in ms (module)"].met


def test_models():
    assert model_bytes(Size(), 4, MODULE, BACKWARD) == 3 * 14500 * 2045 * 4
    assert model_bytes(Size(), 4, STEP, FORWARD) == model_bytes(Size(), 4, MODULE, BACKWARD)
    rows = {(row["gpu"], row["dtype"]): row for row in predict(Size(), [1.0])["rows"]}
    first = rows["RTX 3090", "float32"]
    assert first["bytes_ms"] == first["floor_ms"] == pytest.approx(355.83e6 / 936e9 * 1e3)
    # 64 keys meet M and 32 meet M', forward and backward; 32 are written into each.
    assert first["flop"] == 2 * (2 * (64 * 9000 + 32 * 5500) + 32 * 14500) * 2045
    assert first["operations_ms"] == pytest.approx(first["flop"] / 35.6e12 * 1e3)
    assert first["with_scan_ms"] - first["floor_ms"] == pytest.approx(0.256)
    half = rows["RTX 3090", "bfloat16"]
    assert half["flop"] == 3 * first["flop"] and half["floor_ms"] == half["operations_ms"] > half["bytes_ms"]
    hopper = rows["H100 SXM", "float32"]
    assert hopper["floor_ms"] == hopper["operations_ms"] > hopper["bytes_ms"]


def test_both_limits_are_printed_and_written():
    step, module = some_rows(peak=0)[5:7]
    module.rate = 1e12
    console = Console(width=200, file=io.StringIO())
    tiny("memory").print_rows(console, "module and step", [module, step])
    # 8.05 GFLOP at 1 TFLOP/s; 100 ms are 5.62 times the 17.79 ms of the bytes.
    limits = {"bytes": pytest.approx(0.01779, rel=1e-3), "operations": pytest.approx(8.05e-3, rel=1e-3)}
    assert tiny("memory").figures(module)["floor_seconds"][BACKWARD] == module.limits(BACKWARD) == limits
    assert "operations" not in step.limits(BACKWARD)
    assert "matrix products 1000.0 GFLOP/s" in console.file.getvalue() and "/ 5.62" in console.file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("dtype, arithmetic", [("bfloat16", torch.float32), ("float64", torch.float64)])
def test_the_rate_is_that_of_the_arithmetic(monkeypatch, dtype, arithmetic):
    monkeypatch.setattr("dan_fast.bench.timing.product_rate", lambda device, of, threads: {arithmetic: 1e12}[of])
    assert {row.rate for row in measure(SCORE_SPACE, dtype=dtype)} == {1e12}


def test_a_compile_that_takes_too_long_is_stopped():
    first, again = measure("score_space_compiled", compile_budget_s=0.1, slots_scale="1,2")
    assert first.left_out[FORWARD] == "torch.compile took more than 0 s"
    assert again.left_out[FORWARD].endswith("at 1 x slots in float32")


@pytest.fixture
def gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> str:
    reason = "Triton is not installed; run `pip install triton`"
    monkeypatch.setattr(triton_kernels, "why_not", lambda index=None: reason)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    return reason


def test_kernels_are_not_timed_without_the_extension_or_where_triton_cannot_serve(gpu_without_triton, monkeypatch):
    monkeypatch.setattr(_extension, "why_not_on", lambda *device: "it was not built")
    row = measure(KERNELS)[0]
    assert row.left_out[FORWARD] == "it was not built" and not row.seconds
    monkeypatch.setattr(_extension, "why_not_on", lambda *device: None)
    benchmark = tiny("memory")
    for place, reason in ((CPU, None), (torch.device("cuda"), gpu_without_triton)):
        benchmark.place = place
        assert benchmark._why_not(row, EAGER[3], torch.float32) == reason


def test_the_environment_says_whether_triton_serves_the_gpu(gpu_without_triton, monkeypatch):
    assert environment(CPU)["triton"] is None
    assert environment(torch.device("cuda"))["triton"] == gpu_without_triton
    monkeypatch.setattr(triton_kernels, "why_not", lambda index=None: None)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.6.1"))
    assert environment(torch.device("cuda"))["triton"] == "3.6.1"


@pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
def test_an_operator_that_takes_its_form_for_want_of_triton_is_no_kernel(gpu_without_triton):
    with FakeTensorMode():
        keys, base = torch.empty(2, 3, device="cuda"), torch.empty(4, 3, device="cuda")
        with Operators() as operators:
            torch.ops.dan_fast.memory_scores(keys, base)
            torch.ops.dan_fast.row_sq_norms(base)
    assert operators.names == {"row_sq_norms"}
