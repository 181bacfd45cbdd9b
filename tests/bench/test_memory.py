"""The benchmark of the memory step: the contenders agree, and what disagrees or does not fit is said, not timed."""

import io
import json
import math
import os
import shutil
import subprocess
import warnings
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dan_fast import MemoryState, _extension, functional, reference
from dan_fast.bench import Size, compare, make_problem, memory, select
from dan_fast.bench.agreement import TOLERANCES
from dan_fast.bench.bars import check_bars, predict
from dan_fast.bench.compiled import compile_seconds
from dan_fast.bench.contenders import KERNELS, MODULE, STEP
from dan_fast.bench.literal import InPlaceMemory
from dan_fast.bench.machine import environment, float32_rate, free_memory, peak_above
from dan_fast.bench.memory import Group, Plan
from dan_fast.bench.report import print_rows
from dan_fast.bench.results import BACKWARD, FORWARD, Row, Timing, model_bytes, set_speedups
from dan_fast.cli import main
from dan_fast.functional.memory.row_norms import row_sq_norms
from dan_fast.triton_kernels import float32_products
from tests.support import ROOT

TINY = Size(60, 44, key_dim=24, batch=4)
CPU = torch.device("cpu")
EAGER = [contender for contender in select() if not contender.compiled]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def tiny_plan(*names: str, **settings) -> Plan:
    return Plan(select(names), CPU, TINY, **{"repeat": 2, "steps": 2, "budget_s": 30.0} | settings)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("contender", EAGER[1:], ids=lambda contender: f"{contender.name}-{contender.use}")
def test_contenders_agree_with_the_reference(contender, dtype):
    problem = make_problem(TINY, dtype, CPU, batches=2)
    literal = EAGER[0].start(problem, 1).outcome()
    agreement = compare(contender.start(problem, 1).outcome(), literal, dtype)
    assert agreement.disagrees is None
    if contender.name != "literal_in_place":
        assert "gradient of beta" in agreement.errors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contenders_agree_on_a_gpu(dtype):
    rows = Group(Plan(tuple(EAGER), torch.device("cuda"), TINY, repeat=2, steps=2), 1.0, dtype).measure()
    assert all(row.disagrees is None and row.seconds and not row.left_out for row in rows)
    assert all(row.peak_bytes > 0 and row.bandwidth > 0 for row in rows)


def test_the_problem_has_false_samples():
    problem = make_problem(Size(120, 200, key_dim=24, batch=16), torch.float64, CPU)
    beta = EAGER[0].start(problem, 1).outcome().gradients[4]
    assert beta > 0, "the second term of the loss is 0 where FP and FN are empty"


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_the_literal_loop_follows_the_rules_where_it_is_tight(slots):
    """Fewer slots than samples, ties and empty slots, for several steps from an empty memory."""
    generator = torch.Generator().manual_seed(slots)
    states = [MemoryState.empty(slots, 3, torch.float64), MemoryState.empty(slots + 1, 3, torch.float64)]
    loop = InPlaceMemory(*(MemoryState(*(x.clone() for x in state)) for state in states))
    for step in range(12):
        keys = torch.randint(-1, 2, (2, 4, 3), generator=generator).double()
        labels = torch.randint(3, (4,), generator=generator)
        batch = (keys[0], labels, keys[1], torch.arange(4) + 4 * step, 0.3, -0.2, 0.4)
        expected, found = reference.memory_step(*states, *batch), loop.step(*batch)
        for one, other in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        for one, other in zip(found[2:], expected[2:], strict=True):
            for field in MemoryState._fields:
                torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-9, atol=1e-12)
        states = list(expected[2:])


PLANTED = {
    "loss": lambda o: o._replace(loss=o.loss * 1.001),
    "pseudo_labels": lambda o: o._replace(pseudo_labels=o.pseudo_labels.roll(1)),
    "labeled.least_used": lambda o: o._replace(labeled=o.labeled._replace(least_used=o.labeled.least_used + 1)),
    # As if W^e were forgotten in the write: every slot lacks a small share of a key.
    "unlabeled.features": lambda o: o._replace(
        unlabeled=o.unlabeled._replace(features=o.unlabeled.features * (1 - 1e-2))
    ),
    "labeled.usage": lambda o: o._replace(labeled=o.labeled._replace(usage=o.labeled.usage.nan_to_num() + 1e-4)),
    "unlabeled.evaluation": lambda o: o._replace(
        unlabeled=o.unlabeled._replace(evaluation=o.unlabeled.evaluation.roll(1))
    ),
    "gradient of keys": lambda o: o._replace(gradients=(-o.gradients[0], *o.gradients[1:])),
    "gradient of beta": lambda o: o._replace(gradients=(*o.gradients[:4], o.gradients[4] * torch.nan)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_difference_is_named(what, dtype):
    literal = EAGER[0].start(make_problem(TINY, dtype, CPU, batches=1), 1).outcome()
    assert compare(literal, literal, dtype).disagrees is None
    disagrees = compare(PLANTED[what](literal), literal, dtype).disagrees
    assert disagrees is not None and what in disagrees


@pytest.mark.slow
def test_what_disagrees_has_no_ratio(monkeypatch, capsys, tmp_path):
    step = functional.memory_step
    monkeypatch.setattr(functional, "memory_step", lambda *a, **k: (r := step(*a, **k))._replace(loss=r.loss * 1.01))
    out = tmp_path / "figures.json"
    assert main(tiny_command("--contenders", "literal_autograd,literal_in_place,score_space", "--json", str(out))) == 0
    printed = capsys.readouterr().out
    assert "score_space (step): disagrees with literal_autograd: loss by" in printed
    rows = {(row["contender"], row["use"]): row for row in json.loads(out.read_text())["rows"]}
    assert rows["score_space", STEP]["speedup"] == {}
    assert "loss" in rows["score_space", STEP]["disagrees"]
    # Neither is it a rival for those that agree.
    assert rows["literal_autograd", STEP]["speedup"].keys() == {"literal_in_place"}
    assert rows["score_space", MODULE]["speedup"].keys() == {"literal_autograd", "literal_in_place"}


def tiny_command(*arguments: str) -> list[str]:
    return [
        *("bench", "memory", "--device", "cpu", "--labeled_slots", "60", "--unlabeled_slots", "44"),
        *("--key_dim", "24", "--batch", "4", "--repeat", "2", "--steps", "2", "--slots_scale", "1"),
        *("--dtype", "float32", *arguments),
    ]


@pytest.mark.slow
def test_the_command_writes_everything_down(tmp_path, capsys):
    out = tmp_path / "figures.json"
    names = "literal_autograd,literal_in_place,score_space,kernels"
    assert main(tiny_command("--contenders", names, "--slots_scale", "1,2", "--threads", "1", "--json", str(out))) == 0
    content = json.loads(out.read_text())
    assert content["schema"] == 1 and content["complete"] is True
    assert {"torch", "commit", "cpu", "threads", "date", "gpu", "driver"} <= content["environment"].keys()
    assert content["settings"]["slots_scale"] == [1.0, 2.0]
    assert "prediction" in content["prediction"]["what"]
    assert content["tolerances"].keys() == {"float32"}
    for row in content["rows"]:
        if row["left_out"]:
            assert row["contender"] == KERNELS and not row["seconds"]
            continue
        assert row["disagrees"] is None
        for timing in row["seconds"].values():
            assert timing["repeats"] == len(timing["all"]) == 2
            assert 0 < timing["q1"] <= timing["median"] <= timing["q3"]
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] >= 0
        assert all(share > 0 for share in row["bandwidth_share"].values())
    assert {tuple(row["size"].values())[:2] for row in content["rows"]} == {(60, 44), (120, 88)}
    printed = capsys.readouterr().out
    for part in ("literal_in_place", "copy bandwidth", "Bars", "PREDICTION, nothing here was measured"):
        assert part in printed


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--slots_scale", "1,x"], 1, "slots_scale: 'x'"),
        (["--slots_scale", "0"], 1, "slots_scale: '0'"),
        (["--dtype", "int8"], 1, "dtype: 'int8'"),
        (["--contenders", "fastest"], 1, "contenders: there is no contender 'fastest'"),
        (["--repeat", "0"], 2, '"repeat"'),
        (["--budget_s", "-1"], 2, '"budget_s"'),
        (["--device", "mps"], 1, "mps"),
        (["--json", "/proc/none/x.json"], 1, "/proc/none/x.json"),
        (["--contenders", "literal_in_place", "--check", "true"], 1, "bars are missed"),
    ],
)
def test_a_mistake_names_the_option(arguments, code, sentence, capsys):
    assert main(tiny_command(*arguments)) == code
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors


def test_what_takes_too_long_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 10)
    rows = Group(tiny_plan("literal_autograd", "score_space", budget_s=1e-6), 1.0, torch.float32).measure()
    assert all(not row.seconds and not row.speedup for row in rows)
    assert "a run would take about" in rows[0].left_out[FORWARD] and "the budget is" in rows[1].left_out[BACKWARD]


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 10)
    monkeypatch.setattr(Group, "_estimate", lambda self, contender: (0.0, 5e9))
    free = 10 * TINY.slots * TINY.key_dim * 4
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    rows = Group(tiny_plan("literal_autograd", "literal_in_place", "score_space"), 1.0, torch.float32).measure()
    assert rows[0].left_out[FORWARD].startswith("a run would need about 6.0 GB")
    assert rows[2].seconds.keys() == {FORWARD, BACKWARD}
    free = 1
    rows = Group(tiny_plan("score_space"), 1.0, torch.float32).measure()
    assert "the memories would need" in rows[0].left_out[FORWARD]


@pytest.mark.slow
def test_repetitions_end_with_the_budget(monkeypatch):
    group = Group(tiny_plan("score_space", repeat=6), 1.0, torch.float32)
    real = Group._once
    # The first run of each pass decides: half the budget leaves two repetitions.
    monkeypatch.setattr(Group, "_once", lambda self, *a: (real(self, *a), 15.0)[1])
    rows = group.measure()
    assert [len(timing.seconds) for row in rows for timing in row.seconds.values()] == [2] * 4


def test_the_estimate_grows_with_the_slots(monkeypatch):
    monkeypatch.setattr(memory, "_PROBE_SLOTS", 20)
    assert Group(tiny_plan("literal_autograd"), 0.5, torch.float32)._estimate(EAGER[0]) == (0.0, 0.0)
    probed = []
    real = memory.make_problem
    monkeypatch.setattr(memory, "make_problem", lambda size, *a, **k: (probed.append(size), real(size, *a, **k))[1])
    seconds, _ = Group(tiny_plan("literal_autograd"), 100.0, torch.float32)._estimate(EAGER[0])
    assert seconds > 0 and probed == [Size(20, 15, 24, 4)]


def row(contender: str, use: str, forward: float, backward: float | None, **fields) -> Row:
    values = {"dtype": "float32", "itemsize": 4, "scale": 1.0, "size": Size()} | fields
    seconds = {FORWARD: Timing([forward])} | ({} if backward is None else {BACKWARD: Timing([backward])})
    return Row(contender, use, seconds=seconds, **values)


def some_rows(peak: int) -> list[Row]:
    rows = [
        row("literal_autograd", STEP, 10.0, 35.0),
        row("literal_in_place", MODULE, 1.0, None),
        row("score_space", STEP, 0.2, 0.4),
        row("score_space_compiled", STEP, 0.1, 0.2),
        row("score_space", MODULE, 0.2, 0.3),
        row(KERNELS, STEP, 0.05, 0.08, peak_bytes=peak + 7, returned_bytes=7, bandwidth=20e9),
        row(KERNELS, MODULE, 0.04, 0.1, peak_bytes=peak, bandwidth=20e9),
    ]
    set_speedups(rows)
    return rows + [row(KERNELS, use, 1.0, 2.0, scale=16.0, size=Size().scaled(16)) for use in (STEP, MODULE)]


def test_ratios():
    step, module = some_rows(0)[5:7]
    assert step.speedup["literal_autograd"] == {FORWARD: 200.0, BACKWARD: pytest.approx(437.5)}
    assert step.speedup["best_pytorch"] == {FORWARD: pytest.approx(2.0), BACKWARD: pytest.approx(2.5)}
    assert module.speedup["best_pytorch"] == {FORWARD: pytest.approx(5.0), BACKWARD: pytest.approx(3.0)}
    assert module.speedup["literal_in_place"] == {FORWARD: pytest.approx(25.0)}
    rows = some_rows(0)[:7]
    rows[3].disagrees = rows[1].disagrees = "loss"
    set_speedups(rows)
    step = rows[5]
    assert step.speedup["best_pytorch"][BACKWARD] == pytest.approx(5.0), "the compiled one no longer counts"
    assert "literal_in_place" not in step.speedup and rows[3].speedup == {}


def test_bars():
    bars = check_bars(some_rows(peak=90_000_000), "cpu")
    verdicts = {bar.name: bar.verdict for bar in bars}
    assert verdicts.pop("linear in slots (step)") == "NOT met", "2 / 0.08 is more than 16 x 1.25"
    assert set(verdicts.values()) == {"met"} and len(verdicts) == 8
    too_much = {bar.name: bar.met for bar in check_bars(some_rows(peak=101_000_000), "cpu")}
    assert not too_much["peak memory above the memories in MB (module)"]
    assert {bar.verdict for bar in check_bars([], "cpu")} == {"not measured"}
    wrong = some_rows(peak=0)
    wrong[6].disagrees = "loss"
    assert {bar.verdict for bar in check_bars(wrong, "cpu") if "(module)" in bar.name} == {"not measured"}


def test_the_bar_of_a_gpu():
    rows = some_rows(peak=0)
    bars = {bar.name: bar for bar in check_bars(rows, "cuda")}
    bar = bars["forward + backward in ms (module)"]
    # 2.5 x 355.83 MB / 20 GB/s + 64 x 4 us = 44.7 ms
    assert bar.limit.startswith("at most 44.7 ms") and bar.value == pytest.approx(100.0) and not bar.met
    rows[6].seconds[BACKWARD] = Timing([0.044])
    assert {bar.name: bar for bar in check_bars(rows, "cuda")}["forward + backward in ms (module)"].met


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


@pytest.mark.parametrize("gpu, tera", [((8, 6, 82, 1.695), 35.6), ((8, 0, 108, 1.41), 19.5), ((9, 0, 132, 1.98), 66.9)])
def test_the_float32_rate_of_a_gpu_is_that_of_its_data_sheet(monkeypatch, gpu, tera):
    major, minor, count, clock = gpu
    found = SimpleNamespace(major=major, minor=minor, multi_processor_count=count, clock_rate=round(clock * 1e6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert float32_rate(torch.device("cuda")) == pytest.approx(tera * 1e12, rel=2e-3)
    assert float32_rate(CPU) is None


def test_both_floors_are_printed_and_written():
    rows = some_rows(peak=0)[5:7]
    rows[1].float32_rate = 35.6e12
    console = Console(width=200, file=io.StringIO())
    print_rows(console, rows)
    text = " ".join(console.file.getvalue().split())
    sentence = "(module): 17.79 ms by bytes at that bandwidth, 0.23 ms by operations at 35.6 TFLOP/s in float32"
    assert text.count("floors of forward + backward") == 1 and sentence in text
    floors = rows[1].to_dict()["floor_seconds"]
    assert floors[BACKWARD] == {
        "bytes": pytest.approx(0.01779, rel=1e-3),
        "operations": pytest.approx(2.26e-4, rel=1e-3),
    }
    assert floors[FORWARD]["operations"] < floors[BACKWARD]["operations"]


@pytest.mark.slow
def test_the_rate_is_of_what_is_multiplied_in_float32(monkeypatch):
    monkeypatch.setattr(memory, "float32_rate", lambda device: 1e12)
    for dtype, products, known in ((torch.float32, "float32", True), (torch.bfloat16, "float32", False),
                                   (torch.float32, "tf32x3", False)):  # fmt: skip
        with float32_products(products):
            rows = Group(tiny_plan("score_space"), 1.0, dtype).measure()
        assert all((row.float32_rate is not None) == known for row in rows), (dtype, products)


def test_quartiles():
    timing = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))
    assert Timing([2.0]).quartiles == (2.0, 2.0)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell the peak")
def test_the_peak_counts_what_is_freed_again():
    def run() -> torch.Tensor:
        torch.ones(10_000_000)
        return torch.ones(1000)

    result, peak = peak_above(CPU, run)
    assert len(result) == 1000 and 39e6 <= peak < 44e6


def test_the_machine_is_described():
    found = environment(CPU)
    assert found["torch"] == torch.__version__ and found["gpu"] is None and found["cpu"]
    free = free_memory(CPU)
    assert free is None or 0 < free < math.inf


def test_a_compile_that_takes_too_long_is_stopped():
    (compiled,) = select(["score_space_compiled"])
    assert compile_seconds(compiled, TINY, torch.float32, CPU, 0.1) == "torch.compile took more than 0 s"
    plan = tiny_plan("score_space_compiled", compile_budget_s=0.1)
    first, again = (Group(plan, scale, torch.float32).measure()[0] for scale in (1.0, 2.0))
    assert first.left_out[FORWARD] == "torch.compile took more than 0 s"
    assert again.left_out[FORWARD].endswith("at 1 x slots in float32")


@pytest.mark.slow
def test_without_the_extension_kernels_are_not_timed(monkeypatch):
    monkeypatch.setattr(_extension, "why_not_on", lambda *device: "it was not built")
    rows = Group(tiny_plan("score_space", "kernels"), 1.0, torch.float32).measure()
    kernels = [row for row in rows if row.contender == KERNELS]
    assert [row.left_out[FORWARD] for row in kernels] == ["it was not built"] * 2
    assert not any(row.seconds for row in kernels)


@pytest.mark.slow
@pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
def test_each_row_says_which_operators_ran():
    rows = Group(tiny_plan("score_space", "kernels"), 1.0, torch.float32).measure()
    for found in rows:
        assert bool(found.operators) == (found.contender == KERNELS), found.operators


def test_disabled_takes_the_pytorch_path_without_a_warning():
    before = _extension.serves("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with _extension.disabled():
            with _extension.disabled():
                assert not _extension.serves("cpu")
            assert not _extension.serves("cpu"), "the inner one must not end the outer one"
    assert _extension.serves("cpu") == before
    with pytest.raises(KeyError), _extension.disabled():
        raise KeyError
    assert _extension.serves("cpu") == before


@pytest.mark.compile
@pytest.mark.skipif(not _extension.loaded(), reason=f"no extension: {_extension.why_not()}")
def test_disabled_holds_when_a_function_is_traced():
    features = torch.ones(3, 4)
    graphs: list[str] = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    with _extension.disabled():
        torch.compile(row_sq_norms, backend=keep)(features)
    torch.compiler.reset()
    torch.compile(row_sq_norms, backend=keep)(features)
    torch.compiler.reset()
    assert ["dan_fast" in code for code in graphs] == [False, True]


def test_the_gpu_check_says_what_it_would_do(tmp_path):
    done = subprocess.run(
        ["bash", SCRIPT, "--dry-run"], env=os.environ | {"OUT": str(tmp_path / "out")}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for part in (
        "pip install",
        "-m gpu",
        "memcheck",
        "racecheck",
        "synccheck",
        "bench memory --device cuda",
        "bench attention",
        "bench iteration",
        "quickstart",
    ):
        assert part in done.stdout
    assert not (tmp_path / "out").exists()


def test_the_gpu_check_goes_on_after_a_failure(tmp_path):
    """With programs that fail, hang or succeed in place of the real ones."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    scripts = {
        "python": 'case "$*" in *"pip install"*) exit 3;; *"-m gpu"*) sleep 60;; *) echo "ran $*";; esac',
        "compute-sanitizer": 'case "$*" in *racecheck*) echo "ERROR SUMMARY: 2 errors"; exit 9;; esac',
        "nvidia-smi": "echo GPU",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    settings = {"OUT": str(out), "PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python", "GPU_TESTS_S": "1"}
    done = subprocess.run(["bash", SCRIPT], env=os.environ | settings, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout
    verdicts = dict(reversed(line.split(None, 2)[:2]) for line in summary.splitlines() if line[:4] in ("ok  ", "FAIL"))
    assert verdicts["build"] == verdicts["gpu_tests"] == verdicts["racecheck"] == "FAIL"
    assert verdicts["memcheck"] == verdicts["synccheck"] == verdicts["bench"] == "ok"
    assert "time limit" in summary and "ran -m dan_fast bench memory" in (out / "bench.log").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_gpu_check_is_clean():
    subprocess.run(["shellcheck", SCRIPT], check=True)
