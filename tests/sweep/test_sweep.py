"""`dan-fast sweep`: which trainings a grid means, and that killed, failed and finished ones are told apart."""

import csv
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.data.synthetic import synthesize
from dan_fast.reporting.curves import read_scalars
from dan_fast.reporting.groups import swept_settings
from dan_fast.reporting.report import report
from dan_fast.reporting.runs import read_runs
from dan_fast.sweep import runner as sweeping
from dan_fast.sweep.grid import GRIDS, plan_sweep, run_name
from dan_fast.sweep.runner import sweep
from dan_fast.training import TrainConfig
from dan_fast.training.reported import CHOSEN, SEEN
from tests.support import in_checkout
from tests.support.figures import evaluation
from tests.support.tiny_training import wait_until
from tests.support.training_runs import config, has_logged

BASE = {"data": {"labeled": "market"}}
WHOLE = TrainConfig.of_recipe("dan", **BASE).to_dict()


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture
def grid(tmp_path) -> Path:
    grids = [{"loss.adversary": [0.2, 0.6], "model.reduction": [1, 12]}]
    return write(tmp_path / "grid.yaml", {"base": BASE, "grids": grids})


def test_a_grid_is_every_combination_once(tmp_path, grid):
    runs = plan_sweep(grid, None, tmp_path / "out")
    combinations = [(adversary, reduction) for adversary in (0.2, 0.6) for reduction in (1, 12)]
    assert [run.name for run in runs] == ["loss.adversary={},model.reduction={}".format(*each) for each in combinations]
    assert [(run.config.loss.adversary, run.config.model.reduction) for run in runs] == combinations
    assert all(run.config.data.labeled == ["market"] for run in runs)
    assert [run.folder for run in runs] == [tmp_path / "out" / run.name for run in runs]
    # The default is 0.6 and 12: written out or not, it is one training.
    twice = {"base": BASE, "grids": [{"loss.adversary": [0.6]}, {"model.reduction": [12, 4]}]}
    runs = plan_sweep(write(tmp_path / "twice.yaml", twice), None, "out")
    assert [run.name for run in runs] == ["loss.adversary=0.6", "model.reduction=4"]


@pytest.mark.parametrize("section", [{"labeled": "there"}, "data.yaml"], ids=["inline", "file"])
def test_a_base_is_inline_beside_the_grid_or_named_and_a_section_of_it_a_file(tmp_path, grid, section):
    """As `dan-fast train --config` takes it."""
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/data.yaml", {"labeled": "there"})
    content = {"data": section, "optimizer": {"epochs": 3}}
    base = write(tmp_path / "sub/base.yaml", content)
    runs = [plan_sweep(grid, base, "out")[0]]
    for place in (content, "base.yaml"):
        beside = write(tmp_path / "sub/grid.yaml", {"base": place, "grids": [{"meta.eta": [0.5]}]})
        runs += plan_sweep(beside, None, "out")
        assert runs[-1].config.meta.eta == 0.5
    assert all((run.config.data.labeled, run.config.optimizer.epochs) == (["there"], 3) for run in runs)


def test_the_shipped_grids_are_the_papers(tmp_path):
    base = write(tmp_path / "base.yaml", {"data": {"labeled": "m", "unlabeled": "u"}})
    planned = {grid: plan_sweep(grid, base, "out") for grid in GRIDS}
    models = [run.config.model for run in planned["fig6"]]
    assert sorted((each.attention, each.adversary, each.reduction) for each in models) == sorted(
        [*((kind, False, 12) for kind in ("none", "spatial", "non_local", "nl_cbam")), ("cbam", True, 12)]
        + [("nl_cbam", True, 1), ("nl_cbam", True, 12)]
    )
    assert all(run.config.data.unlabeled_share == 0 for run in planned["fig6"])
    assert [run.config.data.unlabeled_share for run in planned["fig7"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [run.config.meta.procedure for run in planned["table9"]] == ["daml1", "daml2", "daml3"]
    # The paper's figures are of the paper's training, whatever the default has become.
    for name in ("fig6", "fig7", "fig8", "table9"):
        assert {run.config.recipe for run in planned[name]} == {"paper"}
        assert {run.config.loss.labeled_embedding for run in planned[name]} == {0.0}
    losses = [run.config.loss for run in planned["fig8"]]
    losses = {(each.adversary, each.embedding, each.regularizer) for each in losses}
    assert {(0.2, 1.0, 1.0), (0.6, 0.25, 1.0), (0.6, 0.5, 0.2)} <= losses
    assert [run.name for run in planned["recipes"][:3]] == [f"{arm},run.seed=0" for arm in ("plain", "paper", "dan")]
    assert len(planned["recipes"]) == 9 and {run.baseline for run in planned["recipes"]} == {"plain"}
    assert {1, 12, 20} <= {run.config.model.reduction for run in planned["fig8"]}
    assert {3000, 9000} <= {run.config.memory.labeled_slots for run in planned["fig8"]}
    assert len({run.name for run in planned["fig8"]}) == len(planned["fig8"])


@pytest.mark.slow
def test_the_experiments_take_the_device_that_their_tables_are_of():
    devices = {
        path.stem: {run.config.run.device for run in plan_sweep(path, None, "out")}
        for path in in_checkout("benchmarks/experiments").glob("*.yaml")
        if path.stem != "base"
    }
    gpu, cpu = {"auto"}, {"cpu"}
    assert devices == {"recipes": gpu, "cuhk03": gpu, "long": gpu, "parts": gpu, "larger": cpu, "order": cpu}


def test_arms_are_trained_once_a_seed(tmp_path):
    arms = {"plain": {"recipe": "plain"}, "dan2": {"meta.order": 2, "loss": {"adversary": 0.1}}, "dan": None}
    content = {"base": {**BASE, "loss": {"embedding": 0.4}}, "arms": arms, "seeds": [3, 0], "baseline": "dan"}
    runs = plan_sweep(write(tmp_path / "arms.yaml", content), None, tmp_path / "out")
    pairs = [(arm, seed) for seed in (3, 0) for arm in ("plain", "dan2", "dan")]
    assert [run.name for run in runs] == [f"{arm},run.seed={seed}" for arm, seed in pairs]
    assert [(run.arm, run.config.run.seed) for run in runs] == pairs
    assert {run.baseline for run in runs} == {"dan"}
    plain, dan2, dan = (run.config for run in runs[:3])
    assert [config.recipe for config in (plain, dan2, dan)] == ["plain", "dan", "dan"]
    assert (plain.meta.procedure, plain.loss.adversary, plain.loss.embedding) == ("daml1", 0.0, 0.4)
    assert (dan2.meta.order, dan2.loss.adversary, dan.meta.order) == (2, 0.1, 1)
    assert dan2.recipe_words == "recipe dan, with loss.adversary=0.1, loss.embedding=0.4, meta.order=2"
    assert runs[0].settings == {"recipe": "plain", "run.seed": 3}
    # Without seeds the base's, without a baseline the first.
    del content["seeds"], content["baseline"]
    runs = plan_sweep(write(tmp_path / "arms.yaml", content), None, tmp_path / "out")
    assert [(run.name, run.baseline, run.config.run.seed) for run in runs] == [
        (arm, "plain", 0) for arm in ("plain", "dan2", "dan")
    ]


def test_combinations_are_trained_once_a_seed(tmp_path):
    content = {"base": BASE, "grids": [{"model.reduction": [1, 4]}], "seeds": [0, 1], "baseline": "model.reduction=4"}
    runs = plan_sweep(write(tmp_path / "grid.yaml", content), None, "out")
    assert [(run.name, run.arm) for run in runs] == [
        (f"model.reduction={number},run.seed={seed}", f"model.reduction={number}")
        for seed in (0, 1)
        for number in (1, 4)
    ]
    assert {run.baseline for run in runs} == {"model.reduction=4"}
    del content["seeds"], content["baseline"]
    assert [run.arm for run in plan_sweep(write(tmp_path / "grid.yaml", content), None, "out")] == ["", ""]


def test_a_recipe_comes_from_the_arm_the_flag_the_base_the_grid_or_the_default(tmp_path):
    content = {"base": BASE, "arms": {"a": {"recipe": "plain"}, "b": {"meta.eta": 0.5}}}
    path = write(tmp_path / "arms.yaml", content)

    def recipes(**flags: str) -> list[str]:
        return [run.config.recipe for run in plan_sweep(path, None, "out", **flags)]

    assert recipes() == ["plain", "dan"] and recipes(recipe="paper") == ["plain", "paper"]
    write(path, {**content, "recipe": "paper"})
    assert recipes() == ["plain", "paper"] and recipes(recipe="none") == ["plain", "none"]
    write(path, {**content, "recipe": "paper", "base": {**BASE, "recipe": "none"}})
    assert recipes() == ["plain", "none"] and recipes(recipe="paper") == ["plain", "paper"]
    # The configuration of an older run decides what is learnt; it is no change of today's default.
    whole = {section: values for section, values in TrainConfig().to_dict().items() if section != "recipe"}
    write(path, {"base": {**whole, **BASE}, "grids": [{"meta.eta": [0.5]}]})
    assert recipes() == ["none"]


def test_the_home_folder_is_written_out_in_base_and_grid(tmp_path):
    """As the training writes it into its config.yaml, with which the sweep compares."""
    base = {"data": {"labeled": "~/market", "root": "~/sets"}, "model": {"weights": "~/w.pt"}}
    path = write(tmp_path / "grid.yaml", {"base": base, "grids": [{"data.targets": [["~/duke", "b~"], "~"]}]})
    home, runs = str(Path.home()), plan_sweep(path, None, "~/out")
    assert runs[0].folder.parent == Path.home() / "out"
    assert [run.config.data.targets for run in runs] == [[f"{home}/duke", "b~"], [home]]
    first = runs[0].config
    assert (first.data.labeled, first.data.root) == ([f"{home}/market"], f"{home}/sets")
    assert first.model.weights == f"{home}/w.pt"


def test_results_are_said_in_percent(quick, three, capsys):
    quick(reductions(three, 5), **{reduce(5): [evaluation("[b]:snake:", 0.5, 0.25)]})
    assert "[b]:snake: R1 50.0, mAP 25.0 (" in capsys.readouterr().out, "the seconds follow"
    chosen = {"variant": "labeled", "epoch": f"epoch 3 of 9, {CHOSEN}", "seen": f"2 {SEEN}"}
    quick(reductions(three, 7), **{reduce(7): [evaluation("street", 0.5, 0.25) | chosen]})
    assert f"street (labeled) R1 50.0, mAP 25.0 ({CHOSEN}; {SEEN}) (" in capsys.readouterr().out


def test_names_are_folders():
    assert run_name({}) == "base"
    settings = {"data.unlabeled": ["a", "b"], "model.adversary": True}
    assert run_name(settings) == "data.unlabeled=a+b,model.adversary=true"
    paths = [run_name({"data.labeled": [path]}) for path in ("/a/b", "-a/b", "/a b")]
    assert len(set(paths)) == 3 and not any("/" in name or " " in name for name in paths)
    assert len(run_name({f"section.{number}": number for number in range(99)})) < 200
    for long in ("数据" * 99, "-" + "数据" * 30):
        assert len(run_name({"data.labeled": long}).encode()) <= 255
    assert run_name({"data.labeled": "数据" * 30}) == "data.labeled=" + "数据" * 30, "which is short enough"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"grids": [{"loss.advrsary": [1]}]}, "loss.advrsary in .* no setting .*; is loss.adversary"),
        ({"grids": [{"model.reduction": ["many"]}]}, "model.reduction=many are no training"),
        ({"grids": [{"model.reduction": 4}]}, "model.reduction in [^ ]* has 4: give it a list"),
        ({"grids": [{"model.reduction": []}]}, "give it a list of one value or more"),
        ({"grids": [{"run.out": ["a"]}]}, "run.out in .* is for the sweep to choose"),
        ({"grids": {"model.reduction": [1]}}, "needs a list `grids`"),
        ({}, "needs a list `grids`"),
        ({"grids": [{"model.reduction": [1]}], "arms": {"a": {}}}, "has both `grids` and `arms`"),
        ({"arms": []}, "arms in .* must map names to dotted settings"),
        ({"arms": {"a/b": {}}}, "The arm 'a/b' in .* cannot be a folder's name"),
        ({"arms": {"a": 3}}, "The arm a in .* has 3: give it a mapping"),
        *(
            ({"arms": {"a": {}, name: {}}}, f"The arm {name} in .* is called as a file of the sweep")
            for name in ("report", "sweep.json", "results.csv", "comparison.json", "comparison.md")
        ),
        (
            {"arms": {"a": {"meta": {"order": 2}, "meta.order": 1}}},
            "The arm a in .* gives meta.order twice: leave out one",
        ),
        ({"arms": {"a": {"run.out": "b"}}}, "run.out in .* is for the sweep to choose"),
        ({"arms": {"a": {"meta.eta": None}}}, "Of a, meta.eta is empty: give it a value, or leave it out"),
        ({"arms": {"a": {"order": 1}}}, "order in .* is no setting of a training; is meta.order meant"),
        ({"arms": {"a": {"recipe": "dna"}}}, "There is no recipe 'dna'"),
        ({"base": {**BASE, "recipe": "dna"}, "arms": {"a": {}}}, "There is no recipe 'dna'"),
        ({"arms": {"a": {}, "b": {"recipe": "dan"}}}, "a and b of .* have the same settings"),
        ({"arms": {"a": {}}, "baseline": "b"}, "baseline 'b' of .* is none of its arms: name one of a"),
        ({"arms": {"a": {}}, "baseline": ["a"]}, "baseline .* of .* is none of its arms"),
        (
            {"grids": [{"loss.adversary": [0.6]}, {"model.reduction": [12]}], "baseline": "model.reduction=12"},
            "baseline model.reduction=12 of .* has the settings of an earlier combination: name that one",
        ),
        ({"recipe": "dna", "arms": {"a": {}}}, "There is no recipe 'dna'"),
        ({"arms": {"a": {}}, "seeds": []}, r"seeds in .* has \[\]: give it a list of different"),
        ({"arms": {"a": {}}, "seeds": [1, 1]}, "give it a list of different whole numbers"),
        ({"arms": {"a": {}}, "seeds": [True, -1]}, "give it a list of different whole numbers"),
        ({"arms": {"a": {"run.seed": 3}}, "seeds": [1]}, "has both `seeds` and run.seed"),
        ({"grids": [{"data.targets": [["a", "b"], ["a+b"]]}]}, "are called data.targets=a.b: leave out"),
        ({"grids": [{"data.targets": [[]]}, {"data.targets": [["none"]]}]}, "are called data.targets=none"),
        ({"grids": [{1: [2], "model.reduction": [3]}]}, r"^1 in \S* is no setting of a training\.$"),
        ({"grid": []}, "has 'grid'; a grid has a list `grids`"),
        ({"base": 3, "grids": [{"model.reduction": [1]}]}, "base of .* is neither settings nor a path"),
        ({"base": "gone.yaml", "grids": [{"model.reduction": [1]}]}, "gone.yaml cannot be read as a configuration"),
        ({"base": {"model": 3}, "grids": [{"model.reduction": [1]}]}, "model of the sweep's base is no mapping"),
        ({"base": {}, "grids": [{"model.reduction": [1]}]}, "names no labelled images"),
        # The config.yaml of a run, which names every setting.
        (
            {"base": WHOLE, "grids": [{"recipe": ["plain", "dan"]}]},
            "recipe=plain and recipe=dan of .* have the same settings: .* base wins",
        ),
        (
            "base: {data: {labeled: a}}\ngrids: [{data.targets: [[2024-05-01]]}]",
            "settings of data.targets=2024-05-01 are no training: .*Expected a .*str",
        ),
        ("[}", r"grid.yaml is not YAML \(line 1, column 2: "),
        ("just words", "is not a grid of settings"),
    ],
)
def test_a_wrong_grid_is_one_sentence(content, sentence, tmp_path):
    path = write(tmp_path / "grid.yaml", content if isinstance(content, str) else {"base": BASE} | content)
    with pytest.raises(DanFastError, match=sentence) as raised:
        sweep(str(path), out=str(tmp_path / "out"))
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_an_unknown_grid_names_the_shipped_ones(tmp_path):
    with pytest.raises(DanFastError, match="none of the shipped grids: fig6, fig7, fig8, table9, recipes"):
        plan_sweep(tmp_path / "fig5", None, "out")


# A training of no time: what it does stands in the file "plan" of the sweep's folder, by the name of the run.
TRAINER = """
import json, os, signal, sys, time, yaml
from pathlib import Path
folder = Path(sys.argv[1])
resumed = (folder / "checkpoint.pt").exists()
plan = json.loads((folder.parent / "plan").read_text()).get(folder.name, "finish")
files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
if str(folder.parent.resolve() / ".sweep.lock") not in files:
    sys.exit("The lock is not held.")
with open(folder.parent / "calls", "a") as calls:
    print(folder.name, "resumed" if resumed else "new", file=calls)
if plan == "refuse":
    sys.exit("dan-fast: There is no such target.")
# From here on it trains in the folder.
given, settings = (folder / "sweep.yaml").read_text(), folder / "config.yaml"
if settings.exists() and settings.read_text() != given:
    (folder / "results.json").unlink(missing_ok=True)
settings.write_text(given)
if not resumed:
    (folder / "checkpoint.pt").touch()
libraries = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
(folder / "threads").write_text(" ".join(sorted({os.environ.get(name, "not set") for name in libraries})))
begun, ended = ((folder.parent / name).read_text().count("\\n") for name in ("calls", "ends"))
(folder / "beside").write_text(str(begun - ended))
if plan == "meet":
    # Comes to its end only if another training is under way at the same time, and has counted this one.
    deadline = time.monotonic() + 60
    while not any(each.parent != folder for each in folder.parent.glob("*/beside")):
        if time.monotonic() > deadline:
            sys.exit("There is no other training.")
        time.sleep(0.01)
if plan == "hold":
    signal.signal(signal.SIGTERM, lambda number, frame: (folder / "told").touch() or sys.exit(130))
    (folder / "ready").touch()
    time.sleep(120)
if plan == "fail":
    print("dan-fast: There is no such thing.", file=sys.stderr)
    sys.exit(1)
if plan == "die":
    os.kill(os.getpid(), signal.SIGKILL)
epochs = yaml.safe_load(given)["optimizer"]["epochs"]
targets = plan if isinstance(plan, list) else []
(folder / "results.json").write_text(json.dumps({"epochs": epochs, "iterations": 12, "targets": targets}))
with open(folder.parent / "ends", "a") as ends:
    print(folder.name, file=ends)
"""


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Sets what each run does, sweeps, and gives the calls of the trainer so far."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "ends").touch()
    script = write(tmp_path / "trainer.py", TRAINER)
    monkeypatch.setattr(sweeping, "_command", lambda folder: [sys.executable, str(script), str(folder)])

    def run(grid: Path, parallel: int = 1, **plan: object) -> list[str]:
        (out / "plan").write_text(json.dumps(plan))
        try:
            sweep(str(grid), out=str(out), report=False, parallel=parallel)
        finally:
            calls = (out / "calls").read_text().splitlines()
            run.calls = calls
        return calls

    run.out = out
    return run


@pytest.fixture
def three(tmp_path) -> Path:
    return reductions(tmp_path / "three.yaml", 1, 2, 3)


def reductions(path: Path, *numbers: int, **base: dict) -> Path:
    """A grid of one setting; `base` as sections."""
    return write(path, {"base": {**BASE, **base}, "grids": [{"model.reduction": list(numbers)}]})


def recorded(out: Path, what: str) -> list:
    entries = json.loads((out / "sweep.json").read_text())
    return [entry[what] for entry in entries if entry.get("planned", True)]


def states(out: Path) -> list[str]:
    return recorded(out, "state")


def reduce(number: int) -> str:
    return f"model.reduction={number}"


def files_of(out: Path, name: str) -> list[str]:
    return [(out / reduce(number) / name).read_text() for number in (1, 2, 3)]


def test_runs_are_in_order_and_alone_and_finished_ones_are_skipped(quick, three, capsys):
    assert quick(three) == [f"{reduce(number)} new" for number in (1, 2, 3)]
    assert files_of(quick.out, "beside") == ["1"] * 3 and not list(quick.out.glob("comparison.*"))
    assert quick(three) == quick.calls and len(quick.calls) == 3
    assert "[3/3] model.reduction=3: finished before." in capsys.readouterr().out
    assert states(quick.out) == ["finished"] * 3
    # Runs that a longer grid adds are run, the others are not run again.
    reductions(three, 1, 2, 3, 4)
    assert quick(three)[3:] == ["model.reduction=4 new"]
    # With other targets the trainer is asked to evaluate again.
    reductions(three, 1, data={"labeled": "market", "targets": "duke"})
    with pytest.raises(DanFastError, match="1 of 1 trainings failed"):
        quick(three, **{reduce(1): "fail"})
    # The results that it had are of the old targets.
    assert states(quick.out) == ["failed"]
    assert quick(three)[4:] == ["model.reduction=1 resumed"] * 2


@pytest.fixture
def finished(quick, three) -> Callable[[str], None]:
    """Three finished trainings; sets the targets of the first one."""
    quick(three)
    return lambda targets: reductions(three, 1, data={"labeled": "market", "targets": targets})


def listed(grid: Path, out: Path, capsys: pytest.CaptureFixture) -> list[str]:
    """What --list says of each training."""
    capsys.readouterr()
    assert main(["sweep", "--grid", str(grid), "--out", str(out), "--list"]) == 0
    return [line.split()[3] for line in capsys.readouterr().out.splitlines() if "model.reduction" in line]


@pytest.mark.parametrize("end", ["refuse", "no start"])
def test_results_of_other_targets_are_kept_until_the_training_begins(quick, three, finished, end, monkeypatch, capsys):
    """Whether the training fails before that, or the sweep before it has started it."""
    names = ("results.json", "config.yaml")
    before = [(quick.out / reduce(1) / name).read_bytes() for name in names]
    finished("duke")
    with monkeypatch.context() as patched, pytest.raises((DanFastError, RuntimeError)):
        if end == "no start":
            patched.setattr(subprocess, "Popen", Mock(side_effect=RuntimeError))
        quick(three, **{reduce(1): end})
    assert listed(three, quick.out, capsys) == ["begun"]
    finished([])
    assert listed(three, quick.out, capsys) == ["finished"]
    calls = quick.calls
    assert quick(three) == calls
    assert [(quick.out / reduce(1) / name).read_bytes() for name in names] == before
    # With new ones the old ones are gone.
    finished("duke")
    quick(three)
    assert states(quick.out) == ["finished"] and listed(three, quick.out, capsys) == ["finished"]
    finished([])
    assert listed(three, quick.out, capsys) == ["begun"]


def test_a_training_that_is_killed_leaves_no_results_of_other_targets(quick, three, finished, capsys):
    finished("duke")
    with pytest.raises(DanFastError, match="It was ended by SIGKILL"):
        quick(three, **{reduce(1): "die"})
    for targets in ("duke", []):
        finished(targets)
        assert listed(three, quick.out, capsys) == ["begun"]


@pytest.mark.parametrize(
    ("what", "sentence", "parallel"),
    [("fail", "There is no such thing.", 1), ("fail", "There is no such thing.", 2), ("die", "ended by SIGKILL", 1)],
)
def test_a_failure_is_recorded_and_the_rest_goes_on(quick, three, what, sentence, parallel, capsys):
    with pytest.raises(DanFastError, match=f"1 of 3 trainings failed, the first being model.reduction=2: .*{sentence}"):
        quick(three, parallel, **{reduce(2): what})
    assert states(quick.out) == ["finished", "failed", "finished"]
    assert sentence in recorded(quick.out, "sentence")[1]
    assert re.search(rf"\[2/3\] model.reduction=2: failed: .*{sentence}", capsys.readouterr().out)
    assert quick(three, parallel)[3:] == ["model.reduction=2 resumed"]
    assert states(quick.out) == ["finished"] * 3
    assert recorded(quick.out, "sentence")[1] == ""


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("which", [2, 3])
def test_a_training_that_cannot_be_started_does_not_end_the_others(quick, three, parallel, which):
    (quick.out / reduce(which)).touch()
    first = f"1 of 3 trainings failed, the first being {reduce(which)}: .*File exists"
    with pytest.raises(DanFastError, match=first):
        quick(three, parallel)
    assert states(quick.out) == ["failed" if number == which else "finished" for number in (1, 2, 3)]
    assert not any("running" in entry for entry in json.loads((quick.out / "sweep.json").read_text()))


def test_an_error_of_the_sweep_lets_the_trainings_save_themselves(quick, three, monkeypatch):
    (quick.out / "plan").write_text(json.dumps({reduce(1): "hold"}))
    sent = []
    send = subprocess.Popen.send_signal
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda self, number: sent.append(number) or send(self, number))
    for error, number in ((DanFastError("The disk is full."), signal.SIGTERM), (KeyboardInterrupt(), signal.SIGKILL)):
        with monkeypatch.context() as broken:
            broken.setattr(sweeping, "_add_seconds", Mock(side_effect=[0.0, error]))
            with pytest.raises(type(error)):
                sweep(str(three), out=str(quick.out), report=False)
        assert sent == [number]
        sent.clear()


def test_a_sweep_is_not_started_by_torchrun(quick, three, monkeypatch):
    set_by_torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**set_by_torchrun, "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DanFastError, match="A sweep starts a process for each training itself: call it without torch"):
        sweep(str(three), out=str(quick.out), report=False)


def test_a_time_of_which_a_part_is_not_known_is_not_given(quick, three, monkeypatch):
    with pytest.raises(DanFastError, match="2 of 3 trainings failed"):
        quick(three, **{reduce(1): "fail", reduce(2): "fail"})
    assert min(recorded(quick.out, "seconds")) > 0
    # As if the second one had taken long.
    record = json.loads((quick.out / "sweep.json").read_text())
    record[1]["seconds"] = 1000.0
    (quick.out / "sweep.json").write_text(json.dumps(record))
    # The first one goes on under a sweep that is killed; what is known of the others, of a shorter grid none, is kept.
    reductions(three, 1, 3)
    with monkeypatch.context() as killed:
        killed.setattr(sweeping, "_note_end", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            quick(three)
    reductions(three, 1, 2, 3)
    for _ in range(2):
        quick(three)
        unknown, added, known = recorded(quick.out, "seconds")
        assert states(quick.out) == ["finished"] * 3 and unknown is None and added > 1000 > known > 0


def test_a_protocol_in_another_root_is_looked_at_again(quick, three):
    for root in ("a", "a", "b"):
        calls = quick(reductions(three, 1, data={"protocol": "p1", "root": root}))
    assert calls == [f"{reduce(1)} new", f"{reduce(1)} resumed"]


def test_two_at_a_time_are_two_and_not_three(quick, three, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    for library in sweeping._THREADS:
        monkeypatch.setenv(library, "5")
    calls = quick(three, parallel=2, **{reduce(1): "meet", reduce(2): "meet"})
    assert sorted(calls) == [f"{reduce(number)} new" for number in (1, 2, 3)]
    assert states(quick.out) == ["finished"] * 3
    assert max(files_of(quick.out, "beside")) == "2" and files_of(quick.out, "threads") == ["3"] * 3
    of_all = recorded(quick.out, "seconds_of_all")
    assert recorded(quick.out, "threads") == [3] * 3 and min(*recorded(quick.out, "seconds"), *of_all) > 0
    # Of more at a time than there are cores each has a thread; one that runs alone has what the user gives it.
    for number, parallel, expected in ((4, 8, "1"), (5, 1, "5")):
        quick(reductions(three, 1, 2, 3, number), parallel=parallel)
        assert (quick.out / reduce(number) / "threads").read_text() == expected
        *before, added = recorded(quick.out, "seconds_of_all")
        assert before == of_all and added > 0


def test_how_many_ran_at_once_is_counted(monkeypatch):
    entries = [{"seconds_of_all": before} for before in (0.0, 4.0, None)]
    trainings = [Mock(entry=entry) for entry in entries]
    monkeypatch.setattr(sweeping.time, "monotonic", lambda: 12.0)
    assert sweeping._add_seconds(trainings, 10.0) == 12.0
    # That of an older version, which began to count too late, is not known.
    assert [entry["seconds_of_all"] for entry in entries] == [6.0, 10.0, None]


def when(ready: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Acts once something is so."""

    thread = threading.Thread(target=lambda: wait_until(ready, 300) or act())
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_all_trainings_under_way_and_a_later_call_goes_on(quick, three, number):
    held = [quick.out / reduce(each) for each in (1, 2)]
    stopper = when(lambda: all((folder / "ready").exists() for folder in held), lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt):
        quick(three, parallel=2, **{reduce(1): "hold", reduce(2): "hold"})
    stopper.join()
    assert all((folder / "told").exists() for folder in held)
    assert states(quick.out) == ["begun", "begun", "waiting"]
    spent = recorded(quick.out, "seconds")
    assert sorted(quick(three, parallel=2)[2:]) == [
        f"{reduce(1)} resumed", f"{reduce(2)} resumed", f"{reduce(3)} new",
    ]  # fmt: skip
    assert states(quick.out) == ["finished"] * 3
    now = recorded(quick.out, "seconds")
    assert now[0] > spent[0] and now[1] > spent[1], "the time before the stop counts too"
    # A call that finds all finished does not forget what they took.
    quick(three)
    assert recorded(quick.out, "seconds") == now


def test_seconds_of_two_numbers_of_threads_or_devices_are_no_time(quick, three):
    held = quick.out / reduce(1)
    stopper = when(lambda: (held / "ready").exists(), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        quick(three, parallel=2, **{reduce(1): "hold"})
    stopper.join()
    assert recorded(quick.out, "seconds")[0] > 0
    quick(three, parallel=1)
    first, *_ = json.loads((quick.out / "sweep.json").read_text())
    assert (first["state"], first["seconds"], first["timed"]) == ("finished", None, False)
    for device, seconds in (("cpu", 3.0), ("cuda:0", None)):
        entry = {"seconds": 3.0, "timed": True, "threads": None, "device": "cpu"}
        sweeping._note_start(entry, None, device)
        assert (entry["seconds"], entry["timed"], entry["device"]) == (seconds, seconds is not None, device)


def test_without_locks_a_sweep_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with sweeping._alone(tmp_path) as descriptor:
        assert os.fstat(descriptor)
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    sentence = r"cannot be locked \(Input/output error\): choose another"
    with pytest.raises(DanFastError, match=sentence), sweeping._alone(tmp_path):
        pass


def test_arms_end_in_a_comparison(quick, tmp_path, capsys):
    arms = {"plain": {"recipe": "plain"}, "dan": {"recipe": "dan", "meta.order": 2, "data.unlabeled": ["u"]}}
    grid = write(tmp_path / "arms.yaml", {"base": BASE, "arms": arms, "seeds": [0, 1], "baseline": "plain"})
    of_seeds = {"plain,run.seed=0": 0.40, "plain,run.seed=1": 0.44, "dan,run.seed=0": 0.41}
    plan = {name: [evaluation("street", 0.5, score)] for name, score in of_seeds.items()} | {"dan,run.seed=1": "fail"}
    with pytest.raises(DanFastError, match="1 of 4 trainings failed"):
        quick(grid, parallel=2, **plan)
    text = re.sub(" +", " ", (quick.out / "comparison.md").read_text())
    assert "| dan | 1 | 41.0 | 50.0 | +1.0 | +0.0 | 12 |" in text
    assert "Missing: dan, seed 1: failed: There is no such thing." in text
    quick(grid, **{**plan, "dan,run.seed=1": [evaluation("street", 0.7, 0.47)]})
    text = re.sub(" +", " ", (quick.out / "comparison.md").read_text())
    # Differences of 1 and 3: the mean is 2 and the interval 12.706 wide to both sides.
    assert "| dan | 2 | 44.0 ± 4.2 | 60.0 ± 14.1 | +2.0 [-10.7, +14.7] |" in text and "Missing" not in text
    assert "dan: recipe dan, with meta.order=2, data.unlabeled=['u']." in text
    content = json.loads((quick.out / "comparison.json").read_text())
    assert content["targets"][0]["arms"][1]["mAP"]["difference"]["mean"] == pytest.approx(2.0)
    rows = [*csv.reader((quick.out / "results.csv").read_text().splitlines())]
    settings, figures = "recipe,meta.order,data.unlabeled,run.seed", "R1,R5,R10,mAP,mINP,num_query,num_gallery"
    assert ",".join(rows[0]) == f"run,arm,{settings},target,{figures},conditions"
    assert rows[1][2:6] == ["plain", "1", "[]", "0"], "settings that an arm does not name are its recipe's"
    last = ["dan,run.seed=1", "dan", "dan", "2", '["u"]', "1", "street"]
    figures = ["70.0", "75.0", "75.0", "47.0", "5.0", "30", "40"]
    assert len(rows) == 5 and rows[-1] == [*last, *figures, "fixed query and gallery"]
    page = report([quick.out], out=tmp_path / "page", images=0).read_text()
    assert "out: street (fixed query and gallery, 30 queries, 40 gallery images)" in page
    assert "+2.0 [-10.7, +14.7]" in page and "+2.0 [-10.7, +14.7]" in capsys.readouterr().out
    others = reductions(grid.with_name("others.yaml"), 1)
    quick(others)
    assert not [*quick.out.glob("comparison.*")], "another grid, which compares nothing"
    for content in ("my notes", "{}", "[1]"):
        for name in ("comparison.md", "comparison.json"):
            (quick.out / name).write_text(content)
        quick(others)
        assert [file.read_text() for file in quick.out.glob("comparison.*")] == [content] * 2


def test_results_that_hold_no_figures_do_not_end_a_sweep(quick, three):
    quick(three)
    for number, content in ((1, "{}"), (2, '{"targets": [{"dataset": "a"}]}')):
        (quick.out / reduce(number) / "results.json").write_text(content)
    quick(three)
    assert len((quick.out / "results.csv").read_text().splitlines()) == 1


def test_the_report_is_on_what_is_finished(quick, three, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(sweeping, "write_page", lambda runs, out: told.append((list(runs), out)) or out / "index.html")
    (quick.out / "plan").write_text(json.dumps({reduce(2): "fail"}))
    assert main(["sweep", "--grid", str(three), "--out", str(quick.out)]) == 1
    assert told == [([quick.out / reduce(1), quick.out / reduce(3)], quick.out / "report")]
    printed = capsys.readouterr()
    assert f"Report: {quick.out / 'report' / 'index.html'}" in printed.out
    assert "1 of 3 trainings failed" in printed.err
    (quick.out / "plan").write_text(json.dumps({reduce(number): "fail" for number in (1, 2)}))
    reductions(three, 2)
    assert main(["sweep", "--grid", str(three), "--out", str(quick.out)]) == 1
    assert len(told) == 1


def test_a_folder_with_other_settings_is_left_alone(quick, three):
    quick(three)
    reductions(three, 1, data={"labeled": "duke"})
    for lost, sentence in (
        ("nothing", "data.labeled is"),
        ("results.json", "data.labeled is"),
        ("config.yaml", "without a readable config.yaml"),
        ("a section", "without a readable config.yaml"),
    ):
        (quick.out / reduce(1) / lost).unlink(missing_ok=True)
        if lost == "a section":
            write(quick.out / reduce(1) / "config.yaml", "data:")
        with pytest.raises(DanFastError, match=sentence):
            quick(three)
    assert len(quick.calls) == 3
    # A run that failed before its first checkpoint holds nothing worth keeping: its mistake may be corrected.
    (quick.out / reduce(1) / "checkpoint.pt").unlink()
    assert quick(three)[3:] == ["model.reduction=1 new"]


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        ({"optimizer.epochs": 500}, {"optimizer.epochs": 7}, "optimizer.epochs is 7 here and 500 there"),
        ({"data.unlabeled": "b"}, {}, "data.unlabeled is [] here and ['b'] there"),
        (
            {"data.protocol": "p1", "data.root": "r", "data.labeled": []},
            {"data.protocol": "table4", "data.root": "r", "data.labeled": []},
            "data.protocol is 'table4' here and 'p1' there",
        ),
        # What is reported is the last epoch: in between nothing depends on when there was a test.
        ({"run.evaluate_every": 1}, {"run.evaluate_every": 2}, ""),
        (
            {"run.evaluate_every": 1},
            {"run.evaluate_every": 1, "run.choose_epoch_on_target": True},
            "run.choose_epoch_on_target is True here and False there",
        ),
    ],
)
def test_a_finished_training_of_other_settings_is_another_one(quick, tmp_path, before, now, sentence):
    path = tmp_path / "arms.yaml"
    quick(write(path, {"base": BASE, "arms": {"a": before}}))
    write(path, {"base": BASE, "arms": {"a": now}})
    expected = re.escape(f"({sentence}): choose another --out.")
    with pytest.raises(DanFastError, match=expected) if sentence else nullcontext():
        quick(path)
    assert quick.calls == ["a new"]


def test_the_list_runs_nothing(quick, three, capsys):
    (quick.out / reduce(1)).mkdir()
    (quick.out / reduce(1) / "checkpoint.pt").touch()
    begun = TrainConfig.of_recipe("dan", data={"labeled": ["market"]}, model={"reduction": 1})
    write(quick.out / reduce(1) / "config.yaml", begun.to_dict())
    before = sorted(quick.out.rglob("*"))
    assert listed(three, quick.out, capsys) == ["begun", "waiting", "waiting"]
    assert sorted(quick.out.rglob("*")) == before


def test_two_sweeps_do_not_share_a_folder(quick, three, tmp_path):
    """The trainer of a sweep that was killed still holds the folder."""
    with sweeping._alone(quick.out) as lock:
        trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    try:
        with pytest.raises(DanFastError, match="still at work in"):
            sweep(str(three), out=str(quick.out), report=False)
    finally:
        trainer.kill()
        trainer.wait()
    assert len(quick(three)) == 3


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DanFastError, match="file/sweep cannot be written .Not a directory.: choose another --out."):
        with sweeping._alone(tmp_path / "file/sweep"):
            pass


# A training that goes on after its third iteration only when it is told to stop.
HELD = """
import sys, time
from dan_fast.cli import main
from dan_fast.core.signals import StopRequest
from dan_fast.training import Trainer
note, step, told = StopRequest._note, Trainer.train_iteration, []
StopRequest._note = lambda stop, *given: told.append(given) or note(stop, *given)
def held(trainer, *given):
    step(trainer, *given)
    deadline = time.monotonic() + 600
    while trainer.iterations_done == 2 and not told and time.monotonic() < deadline:
        time.sleep(0.01)
Trainer.train_iteration = held
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_trainings_killed_in_the_middle_go_on(tmp_path, capsys, monkeypatch):
    images = tmp_path / "images"
    synthesize(images, ["campus", "street"], identities=4, cameras=2, image_size=(32, 32), test_fraction=0.5)
    data = {"unlabeled": [], "targets": str(images / "street"), "batch_size": 4}
    base = config(images, out := tmp_path / "out", data=data, optimizer={"epochs": 3}).to_dict()
    del base["run"]["out"], base["loss"]["adversary"], base["recipe"]
    grid = write(tmp_path / "grid.yaml", {"base": base, "grids": [{"loss.adversary": [0.2, 0.6]}]})
    command = ["sweep", "--grid", str(grid), "--out", str(out)]
    first, second = (run.folder for run in plan_sweep(grid, None, out))

    words = sweeping._command
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "_command", lambda folder: [sys.executable, "-c", HELD, *words(folder)[3:]])
        killer = when(lambda: has_logged(first), lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert main([*command, "--report", "false"]) == 130
        killer.join()
    assert "stopped. The same command goes on from here." in capsys.readouterr().out
    assert states(out) == ["begun", "waiting"]
    assert not (first / "results.json").exists() and not second.exists()
    steps = len(read_scalars(first)["train/loss/total"][0])

    assert main([*command, "--report", "false"]) == 0
    assert states(out) == ["finished"] * 2
    iterations = [read_scalars(folder)["train/loss/total"][0].tolist() for folder in (first, second)]
    # It waits after the third iteration where it has not been told to stop before.
    assert iterations[0] == iterations[1] and 0 < steps <= 3 < len(iterations[0])
    # The first went on from its checkpoint: what it logged before being stopped was not logged again.
    assert len(list((first / "tensorboard").iterdir())) == 2
    assert "Continue with --run.resume true" in (first / "train.log").read_text()
    runs = read_runs([out])
    assert [run.settings["loss"]["adversary"] for run in runs] == [0.2, 0.6]
    assert list(swept_settings(runs)) == ["loss.adversary"]
    finished_at = [(folder / "results.json").stat().st_mtime_ns for folder in (first, second)]
    assert main([*command, "--report", "false"]) == 0
    assert capsys.readouterr().out.count(": finished before.") == 2
    assert [(folder / "results.json").stat().st_mtime_ns for folder in (first, second)] == finished_at
