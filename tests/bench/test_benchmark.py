"""What all benchmarks have in common: settings, turns, figures, files, and the script that runs them on a GPU."""

import math
import os
import runpy
import shutil
import subprocess
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dan_fast import _extension, triton_kernels
from dan_fast.bench import BENCHMARKS, timing
from dan_fast.bench.agreement import relative_error
from dan_fast.bench.machine import environment, peak_above, yardstick
from dan_fast.bench.rows import BACKWARD, FORWARD, WHOLE, LeftOut, Row, Timing, plain
from dan_fast.bench.timing import product_rate, repetitions, rounds, take_turns
from dan_fast.cli import main
from dan_fast.core import heap
from dan_fast.core.free_memory import free_memory
from dan_fast.functional.memory.row_norms import row_sq_norms
from tests.bench import TINY, command
from tests.support import ROOT, in_checkout
from tests.support.running import Called
from tests.support.toolchain import needs_extension

CPU = torch.device("cpu")

MISTAKES = {
    "memory": [
        ("--slots_scale 1,x", 1, "slots_scale: 'x'"),
        ("--slots_scale 0", 1, "slots_scale: '0'"),
        ("--dtype int8", 1, "dtype: 'int8'"),
        ("--contenders fastest", 1, "contenders: 'fastest' is not one of literal_autograd, literal_in_place"),
        ("--budget_s -1", 2, '"budget_s"'),
        ("--repeat 0", 2, '"repeat"'),
        ("--device mps", 1, "mps"),
        ("--json /proc/none/x.json", 1, "/proc/none/x.json"),
    ],
    "attention": [
        ("--dtype int8", 1, "dtype: 'int8'"),
        ("--layout rows", 1, "layout: 'rows' is not one of contiguous, channels_last"),
        ("--contenders fastest", 1, "contenders: 'fastest'"),
        ("--height 0", 2, '"height"'),
        ("--threads -1", 2, '"threads"'),
    ],
    "iteration": [
        ("--order 1,3", 1, "order: '3' is not one of 1, 2"),
        ("--contenders fastest", 1, "contenders: 'fastest'"),
        ("--images 7", 1, "images: 7 are too few"),
        ("--classes 1", 1, "classes: 1 is too few"),
        ("--backbone vgg", 2, '"backbone"'),
        ("--precision int8", 2, '"precision"'),
    ],
    "data": [
        ("--files 128", 1, "files: '128' is not a height and a width of at least 32x16, such as 128x64"),
        ("--files 32x16,16x16", 1, "files: '16x16' is not"),
        ("--batch 13", 1, "batch is 13; it must be from 2 to images, 12"),
    ],
    "epoch": [
        ("--files 128", 1, "files: '128' is not a height and a width of at least 32x16, such as 128x64"),
        ("--backbone vgg", 1, "backbone: 'vgg' is not one of resnet18"),
        ("--recipe plain", 1, "recipe: 'plain' is not one of paper, dan"),
        ("--order 3", 1, "order: '3' is not one of 1, 2"),
        ("--batch 7", 1, "batch is 7; it must be from 8 to images, 48"),
    ],
    "ranking": [("--queries 0", 2, '"queries"'), ("--check true", 1, "3 of 3 bars are missed")],
    "search": [
        ("--features 9", 1, "features is 9"),
        ("--contenders annoy", 1, "contenders: 'annoy' is not one of flat, hnsw"),
    ],
}


def test_each_benchmark_has_a_tiny_problem_and_mistakes():
    assert TINY.keys() == BENCHMARKS.keys(), "TINY in tests/bench/__init__.py"
    assert MISTAKES.keys() == BENCHMARKS.keys(), "MISTAKES in this file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "code", "sentence"), [(name, *case) for name, cases in MISTAKES.items() for case in cases]
)
def test_a_mistake_names_the_option(name, arguments, code, sentence, capsys):
    assert main(command(name, *arguments.split())) == code
    errors = capsys.readouterr().err
    assert sentence in errors and "Traceback" not in errors


def test_a_row_is_written_flat():
    row = Row("kernels", {"dtype": torch.float32}, seconds={FORWARD: Timing([2.0])}, model_bytes={FORWARD: 8})
    row.bandwidth, row.peak_bytes, row.returned_bytes = 8.0, 7, 9
    content = plain(row.to_dict())
    assert content["dtype"] == "float32" and content["bandwidth_share"] == {FORWARD: 0.5}
    assert content["extra_bytes"] == 0 and "calls" not in content
    row.leave_out("no time", BACKWARD)
    assert row.remarks() == ["left out (forward + backward): no time"]


def test_what_cannot_run_is_left_out_and_not_called():
    for error, reason in ((LeftOut("no time"), "no time"), (MemoryError(), "out of memory")):
        row = Row("kernels", calls={FORWARD: (print, 1)})
        with row.tried():
            raise error
        assert row.left_out == dict.fromkeys((FORWARD, BACKWARD), reason) and not row.calls


def test_quartiles():
    five = Timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (five.median, five.quartiles) == (3.0, (2.0, 4.0))
    assert Timing([2.0]).quartiles == (2.0, 2.0)


def test_turns():
    assert [repetitions(seconds, 5, 10.0) for seconds in (1.0, 40.0, 0.0)] == [5, 1, 5]
    assert list(rounds([3, 1, 3])) == [[0, 1, 2], [2, 0], [0, 2]] and list(rounds([])) == []


def test_an_error_is_relative_to_what_is_wanted():
    wanted = torch.ones(10_000, 2)
    actual = wanted.clone()
    actual[9_999, 1] += 0.5
    assert relative_error(actual, wanted, math.inf) == 0.5
    assert relative_error(actual, wanted, 2) == pytest.approx(0.5 / 20_000**0.5)
    assert relative_error(actual, wanted, 2, math.inf) == 0.5
    assert all(math.isnan(relative_error(wrong, wanted, 2)) for wrong in (actual[1:], actual * torch.nan))
    assert relative_error(torch.ones(()), torch.zeros(()), 2) > 1e30 and relative_error(wanted[:0], wanted[:0], 2) == 0


def test_the_limit_is_the_larger_of_bytes_and_operations():
    row = Row("kernels", seconds={FORWARD: Timing([6.0]), BACKWARD: Timing([6.0])}, bandwidth=4.0, rate=10.0)
    row.model_bytes, row.flop = {FORWARD: 8, BACKWARD: 8}, {FORWARD: 10.0, BACKWARD: 30.0}
    assert row.limits(FORWARD) == {"bytes": 2.0, "operations": 1.0} and row.over_limit(FORWARD) == 3.0
    assert row.to_dict()["over_limit"] == {FORWARD: 3.0, BACKWARD: 2.0}
    assert row.cells()["limit ms"] == "2e+03 / 3e+03" and row.cells()["over limit"] == "3 / 2"
    row.bandwidth = row.rate = None
    assert row.limits(FORWARD) == {} and row.over_limit(FORWARD) is None and row.cells()["limit ms"] == "-"


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(timing, "_PRODUCTS", {"cpu": (1, 4)})
    monkeypatch.setattr(timing, "_TRIES", 2)
    # Two products of torch, and two of NumPy where it has no more threads than torch.
    for cores, best in ((threads, 3.0), (threads + 1, 5.0)):
        seconds = iter([9.0, 5.0, 4.0, 3.0])
        monkeypatch.setattr(timing, "once", lambda device, product, seconds=seconds: next(seconds))
        monkeypatch.setattr(timing, "CORES", cores)
        timing.product_rate.cache_clear()
        assert product_rate(CPU, torch.float32, threads) == 2 * 4**3 / best


def test_on_a_gpu_several_products_are_timed_at_once(monkeypatch):
    def seconds(device, multiply):
        with FlopCounterMode(display=False) as counter:
            multiply()
        assert counter.get_total_flops() == 3 * 2 * 4**3
        return 0.5

    monkeypatch.setattr(timing, "_PRODUCTS", {"meta": (3, 4)})
    monkeypatch.setattr(timing, "once", seconds)
    assert product_rate(torch.device("meta"), torch.bfloat16, 1) == 3 * 2 * 4**3 / 0.5


def test_a_network_has_a_rate_where_products_are_as_fast_as_its_convolutions(monkeypatch):
    cases = {("tf32", "ieee"): None, ("tf32", "tf32"): torch.float32, ("ieee", "ieee"): torch.float32,
             ("ieee", "tf32"): torch.float32}  # fmt: skip
    for (convolutions, products), rated in cases.items():
        found = {"convolutions": convolutions, "matrix_products": products}
        monkeypatch.setattr(timing, "float32_settings", lambda device, found=found: found)
        assert timing.rated_type(CPU, torch.float32) == rated
        assert timing.rated_type(CPU, torch.bfloat16) == torch.bfloat16


def test_what_is_measured_of_the_machine_is_in_the_rows(monkeypatch):
    monkeypatch.setattr(timing, "product_rate", lambda device, dtype, threads: {torch.float32: 7.0}[dtype])
    rows = [Row(name, calls={WHOLE: (lambda: None, 1)}) for name in ("one", "other")]
    take_turns(CPU, [*rows, left_out := Row("left out")], print, 2**20, torch.float32)
    assert all(row.rate == 7.0 and row.bandwidth > 0 and row.whole for row in rows)
    assert not any(row.calls for row in rows), "what they hold in memory stays until the last row"
    assert yardstick(CPU, 0)[1] == 2 * 16 * 2**20, "read and written"
    assert left_out.rate is left_out.bandwidth is left_out.whole is None


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not tell the peak")
def test_the_peak_counts_what_is_freed_again():
    def run() -> torch.Tensor:
        torch.ones(10_000_000)
        return torch.ones(1000)

    result, peak = peak_above(CPU, run)
    # Linux counts resident pages for each CPU apart, and may leave out half a MB of each where there are many.
    assert len(result) == 1000 and 32e6 <= peak < 48e6


def test_the_machine_is_described():
    found = environment(CPU)
    assert found["torch"] == torch.__version__ and found["gpu"] is None and found["cpu"]
    assert found["heap"] == heap.heap_in_force() and environment(torch.device("meta"))["heap"] is None
    free = free_memory(CPU)
    assert free is None or 0 < free < math.inf


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
    out = tmp_path / "out"
    words, environment = ["bash", in_checkout("scripts/gpu_check.sh"), "--dry-run"], os.environ | {"OUT": str(out)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in ("pip install", "-m gpu", "memcheck", "racecheck", "synccheck", "bench memory --device cuda",
                 "bench attention", "bench iteration", "quickstart"):  # fmt: skip
        assert part in done.stdout
    assert not out.exists()


def test_the_gpu_check_goes_on_after_a_failure(tmp_path):
    """With programs that fail, hang or succeed in place of the real ones."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    scripts = {
        "python": 'case "$*" in *"pip install"*) exit 3;; *"-m gpu"*) sleep 60;; *) echo "ran $*";; esac',
        "compute-sanitizer": 'case "$*" in *racecheck*) echo "ERROR SUMMARY: 2 errors"; exit 9;; esac\n'
        'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING;$PYTHONPATH"',
        "nvidia-smi": "echo GPU",
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    (out / "quickstart/run").mkdir(parents=True)
    for stale in ("memory.json", "attention.json", "iteration.json", "ranking.json", "quickstart/run/last.pt"):
        (out / stale).write_text("of an earlier run")
    (out / "notes.txt").write_text("of the user")
    script = in_checkout("scripts/gpu_check.sh")
    # OUT is of the folder that it is called from.
    environment = os.environ | {"PYTHONPATH": "elsewhere", "OUT": "out", "PATH": f"{tools}:{os.environ['PATH']}"}
    environment |= {"PYTHON": "tools/python", "GPU_TESTS_S": "1"}
    done = subprocess.run(["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert summary in done.stdout
    verdicts = dict(reversed(line.split(None, 2)[:2]) for line in summary.splitlines() if line[:4] in ("ok  ", "FAIL"))
    assert verdicts["build"] == verdicts["gpu_tests"] == verdicts["racecheck"] == "FAIL"
    assert verdicts["memcheck"] == verdicts["synccheck"] == verdicts["bench"] == "ok"
    assert "time limit" in summary and "ran -m dan_fast bench memory" in (out / "bench.log").read_text()
    # memcheck is blind to what lies beside a tensor in a block of PyTorch's allocator.
    assert (out / "memcheck.log").read_text() == f"1;{ROOT}:elsewhere\n"
    assert (out / "synccheck.log").read_text() == f";{ROOT}:elsewhere\n"
    assert {path.name for path in out.iterdir() if path.suffix != ".log"} == {"summary.txt", "notes.txt"}


@pytest.mark.slow
@needs_extension
def test_what_is_sanitized_runs_every_operator_of_the_extension():
    small_steps = runpy.run_path(str(in_checkout("scripts/small_steps.py")))
    with Called() as called:
        small_steps["run"](CPU)
    left = {f"dan_fast::{name}" for name in _extension._OPERATORS} - called.names
    assert not left, "call these in scripts/small_steps.py"


def test_what_is_sanitized_takes_no_path_of_pytorch(monkeypatch):
    small_steps = runpy.run_path(str(in_checkout("scripts/small_steps.py")))
    monkeypatch.setattr(_extension, "why_not_on", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(triton_kernels, "why_not", {3: "Triton is not installed"}.get)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        small_steps["run"](torch.device("cuda"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_gpu_check_is_clean():
    subprocess.run(["shellcheck", in_checkout("scripts/gpu_check.sh")], check=True)
