"""The command line: what each command leaves behind, and one sentence and an exit code for each mistake."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import get_type_hints
from unittest.mock import Mock

import pytest
import torch
import yaml

from dan_fast import cli
from dan_fast.cli import _COMMANDS, _FLAGS_OF_LISTS, _parse, main
from dan_fast.core.errors import Interrupted
from dan_fast.data.synthetic import synthesize
from dan_fast.training.config import DataConfig, Paths
from tests.support import ROOT
from tests.support.training_runs import command as train_words
from tests.support.training_runs import evaluated
from tests.support.untrained import untrained_checkpoint


def tiny_run(images, out) -> list[str]:
    return train_words(out, "--data.labeled", str(images / "campus"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(tiny_run(images, out)) == 0
    return out


def test_train_writes_the_settings_it_was_given(run, images):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["data"]["labeled"] == [str(images / "campus")]
    expected = {"epochs": 1, "lr_scale": 1.0, "momentum": 0.9, "weight_decay": 5e-4, "backbone_lr_scale": 1.0}
    assert settings["optimizer"] == expected


def test_names_that_are_no_utf_8_can_be_printed(tmp_path, monkeypatch):
    strict = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", strict)
    folder = os.path.join(tmp_path, os.fsdecode(b"caf\xe9"))
    assert main(["synthesize", "--root", folder, "--domains", "[mall]", "--identities", "2", "--cameras", "2",
                 "--image_size", "[32, 16]"]) == 0  # fmt: skip
    strict.flush()
    assert rb"caf\udce9" in strict.buffer.getvalue()


def test_what_is_odd_of_datasets_is_said_by_one_rank(images, tmp_path, monkeypatch, caplog):
    log = logging.getLogger("dan_fast.data")
    try:
        for rank, said in (("1", False), ("0", True)):
            log.setLevel(logging.NOTSET)
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                monkeypatch.setenv(name, rank if name == "RANK" else "2")
            main(["protocols", "--root", str(tmp_path)])
            log.getChild("datasets.load").warning("It holds no dataset.")
            assert bool(caplog.records) == said
            caplog.clear()
    finally:
        log.setLevel(logging.NOTSET)


def test_a_run_into_a_file_is_one_sentence(images, tmp_path, capsys):
    (tmp_path / "afile").touch()
    assert main(tiny_run(images, tmp_path / "afile")) == 1
    assert "afile is a file: name another run.out, the folder of a run." in capsys.readouterr().err


@pytest.mark.slow
def test_the_written_settings_start_the_same_run(run, images, tmp_path):
    assert main(["train", "--config", str(run / "config.yaml"), "--run.out", str(tmp_path / "again")]) == 0
    first, second = (torch.load(folder / "checkpoint.pt") for folder in (run, tmp_path / "again"))
    torch.testing.assert_close(first["model"], second["model"], rtol=0, atol=0)


def test_evaluate_prints_a_table_and_writes_json_and_says_how_it_scored(run, images, tmp_path, capsys):
    flags = ["--targets", f"[{images / 'mall'}, {images / 'campus'}]", "--baselines", "true"]
    flags += ["--metric", "euclidean", "--ap", "trapezoid", "--precision", "bfloat16"]
    rows = evaluated(run / "checkpoint.pt", tmp_path / "figures.json", *flags)
    assert [(row["dataset"], row["features"]) for row in rows] == [
        (dataset, features) for dataset in ("mall", "campus") for features in ("trained", "untrained", "chance")
    ]
    assert all(0 <= row["mAP"] <= 1 for row in rows)
    assert {(row["metric"], row["ap"], row["precision"]) for row in rows} == {("euclidean", "trapezoid", "bfloat16")}
    printed = " ".join(capsys.readouterr().out.split())
    assert "campus: the network was trained on images of this set" in printed
    for features in ("trained", "untrained", "chance"):
        assert f"mall, {features}: fixed query and gallery; euclidean distance; trapezoid AP; bfloat16" in printed


@pytest.mark.slow
def test_evaluate_under_torchrun_says_and_writes_what_one_process_does(run, images, tmp_path, capsys):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    shutil.copytree(images / "mall", tmp_path / "mall")
    (tmp_path / "mall/images/400005_c2_01.jpg").write_bytes(b"not an image")
    command = ["evaluate", "--checkpoint", str(run / "checkpoint.pt"), "--targets", str(tmp_path / "mall")]
    command += ["--baselines", "true", "--broken_images", "skip", "--batch_size", "4", "--workers", "0"]
    command += ["--device", "cpu", "--rerank", "true", "--cache", str(tmp_path / "cache"), "--out"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's ranks have; features depend on it
    try:
        assert main([*command, str(one)]) == 0
    finally:
        torch.set_num_threads(threads)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks = subprocess.run([*launcher, "-m", "dan_fast", *command, str(two)], cwd=ROOT, capture_output=True, text=True)
    assert ranks.returncode == 0, ranks.stderr
    assert json.loads(two.read_text()) == json.loads(one.read_text())
    printed, said = (text.splitlines() for text in capsys.readouterr())
    assert sorted(ranks.stdout.splitlines()) == sorted(printed) and any(line.startswith("Skipped") for line in printed)
    # Each line of the progress once, too; by the second time the cache is there.
    done = [line for line in said if not line.startswith("Decoding ")]
    assert [line.split()[0] for line in done] == ["Testing", "mall,", "Testing", "mall,", "mall,"]
    of_progress = [line for line in ranks.stderr.splitlines() if line.startswith(("Testing ", "mall, "))]
    assert of_progress == done


@pytest.mark.slow
def test_quickstart_leaves_a_report_with_pictures(tmp_path, capsys):
    out = tmp_path / "quick"
    command = ["quickstart", "--out", str(out), "--epochs", "1", "--identities", "6", "--recipe", "paper"]
    assert main(command) == 0
    for name in ("index.html", "curves.png", "ranked.png", "attention.png"):
        assert (out / name).stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "untrained" in printed and "trained" in printed and "mAP" in printed
    assert main(command) == 0
    before = {file: file.read_bytes() for file in (out / "data").rglob("*") if file.is_file()}
    capsys.readouterr()
    for other in (["--identities", "7"], ["--seed", "1"], ["--epochs", "2"], ["--recipe", "dan"]):
        assert main([*command, *other]) == 1
        flags = "--identities 6 --seed 0 --epochs 1 --recipe paper"
        said = f"{out} holds a quickstart with {flags}: give these again, or choose another --out."
        assert said in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (out / "data").rglob("*") if file.is_file()} == before


def test_synthesize_prints_the_manifests(tmp_path, capsys):
    root = tmp_path / "drawn"
    assert main(["synthesize", "--root", str(root), "--domains", "[night]", "--identities", "2"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "night" / "manifest.csv")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("train --data.labeled /nowhere", 1, "There is no dataset at /nowhere"),
        ("train", 1, "data.labeled is empty"),
        ("train --data.labeld x", 2, "unrecognized arguments: --data.labeld x; is --data.labeled or --data.un"),
        ("train --order=2", 2, "unrecognized arguments: --order=2; is --meta.order meant? (see"),
        ("evaluate run.pt --targets x", 2, "arguments: run.pt; is --checkpoint run.pt meant? (see"),
        ("evaluate --checkpoint=c --targets a b", 2, "b; several values of --targets are written as"),
        ("doctor --all b", 2, "unrecognized arguments: --all b (see `dan-fast doctor --help`)"),
        ("train --optimizer.epochs 0", 2, '"optimizer.epochs"'),
        ("train --config /nowhere.yaml", 2, "does not exist: '/nowhere.yaml'"),
        ("evaluate --checkpoint /nowhere.pt --targets x", 1, "/nowhere.pt does not exist"),
        ("evaluate", 2, "arguments are required"),
        ("train --data.labeled a --data.labeled=b", 2, "--data.labeled is given more than once"),
        ("search --gallery a --query b --query c", 2, "--query A B (see `dan-fast search --help`)"),
        ("report /nowhere --images 2 --images 3", 1, "/nowhere"),
        ("bench memory --dtyp 1", 2, "--dtyp 1; is --dtype meant? (see `dan-fast bench memory --help`)"),
        ("bench none", 2, "(see `dan-fast bench --help`)"),
        ("train --data.image_size a", 2, '"data.image_size": Expected a list. Got value: a (see'),
        ("train --data.cache_check a", 2, "Expected one of 'quick', 'full'. Got value: a (see"),
        ("train --data.labeled /x --run.out a\udce9", 1, r"run.out is 'a\udce9', which is no UTF-8"),
        ("evaluate --checkpoint ~/no.pt --targets x", 1, f"{Path.home() / 'no.pt'} does not exist"),
        ("evaluate --checkpoint x --targets x --out /proc/x.json", 1, "/proc/x.json could not be"),
        ("evaluate --checkpoint x --targets x --out /", 1, "/ is a folder"),
        (f"evaluate --checkpoint x --targets x --out /{'x' * 300}/y.json", 1, "could not be written"),
        ("search --gallery x --query x --checkpoint x --out /proc/x", 1, "/proc/x/ranked.json"),
        ("export --checkpoint x --out /proc/x.onnx", 1, "/proc/x.onnx could not be written"),
        ("evaluate --checkpoint x --targets []", 1, "targets is empty"),
        (f"evaluate --checkpoint x --targets x --seed {2**64}", 1, "must be below 2^64"),
        ("evaluate --checkpoint x --targets x --device mps", 1, "mps"),
        ("synthesize --root /proc/none --domains [night]", 1, "/proc/none"),
        ("frobnicate", 2, "invalid choice: 'frobnicate'"),
        ("", 2, "was not provided"),
    ],
)
def test_a_mistake_is_one_sentence_and_an_exit_code(arguments, code, sentence, capsys):
    assert main(arguments.split()) == code
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_figures_are_not_written_over_what_a_training_wrote(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("recipe: plain")
    for name in ("results.json", "checkpoint.pt"):
        out = tmp_path / name
        out.write_text("kept")
        assert main(["evaluate", "--checkpoint", "x", "--targets", "x", "--out", str(out)]) == 1
        assert f"{out} is written by the training itself: name another file" in capsys.readouterr().err
        assert out.read_text() == "kept"


@pytest.mark.parametrize("command", ["evaluate --targets x --checkpoint {0} --out", "bench memory --json"])
@pytest.mark.parametrize("content", ["path,pid,camid,split", '[{"arm": 1}]', "3", "a checkpoint"])
def test_a_file_of_somebodys_own_is_not_written_over(command, content, tmp_path, capsys):
    out = tmp_path / "own"
    if content == "a checkpoint":
        untrained_checkpoint(out)
    else:
        out.write_text(content)
    before = out.read_bytes()
    assert main([*command.format(out).split(), str(out)]) == 1
    assert f"{out} was not written by this command: name another file, or remove this one." in capsys.readouterr().err
    assert out.read_bytes() == before


def test_a_pipe_is_no_file_to_write(tmp_path, capsys):
    """It would be waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in ("evaluate --targets x --checkpoint x --out", "bench memory --json", "export --checkpoint x --out"):
        assert main([*command.split(), str(pipe)]) == 1
        assert capsys.readouterr().err == f"dan-fast: {pipe} is no ordinary file: name another one.\n"
        assert main([*command.split(), str(pipe / "below")]) == 1
        assert f"{pipe}/below could not be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "content", "code", "sentence"),
    [
        ("train", b"data:\n", 1, "data in {} is empty and should be a mapping of settings"),
        ("train", b"model: nl_cbam\n", 1, "model in {} is 'nl_cbam' and should be a mapping of settings"),
        ("train", b"run: {out: 2026-02-30}\n", 1, "{} cannot be read as a file of settings (day is out of range"),
        ("train", b"- data\n", 1, "{} is not a file of settings: it must be a YAML mapping"),
        ("train", b"data: {a\n", 1, "{} is not YAML (line 2, column 1: "),
        ("train", b"run: {out: a}\ndata: {}\nrun: {seed: 0}\n", 1, "{} has run in lines 1 and 3: write it once."),
        ("train", b"data:\n  labeled: a\n  labeled: b\n", 1, "{} has labeled in lines 2 and 3: write it once."),
        ("train", b"data: {labeled: a, labeled: b}\n", 1, "{} has labeled twice in line 1: write it once."),
        ("train", b"\xff\xfe\x00", 1, "{} cannot be read as a file of settings"),
        ("train", b"data:\n  labeled: a\n  labled: b\n", 2, "data.labled"),
        ("train", b"lr_scale: 10\n", 2, "lr_scale"),
        ("extract", b"paths: a", 1, "dan-fast: paths in {} is one text: write a list, paths: [A, B].\n"),
        ("search --query b", b"gallery: a", 1, "dan-fast: gallery in {} is one text: write a list, gallery: [A, B].\n"),
        ("report", b"runs: runs/dan", 1, "dan-fast: runs in {} is one text: write a list, runs: [A, B].\n"),
        ("datasets", b"roots: data", 1, "dan-fast: roots in {} is one text: write a list, roots: [A, B].\n"),
    ],
)
def test_a_file_that_holds_no_settings_is_named(command, content, code, sentence, tmp_path, capsys):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    assert main([*command.split(), f"--config={path}"]) == code
    error = capsys.readouterr().err
    assert sentence.format(path) in error and error.count("\n") == 1


def test_sections_may_be_written_with_dots(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("data.batch_size: 12\nrun: {out: ~/runs/x}\nrecipe: plain\n")
    settings = _parse(["train", "--config", str(path)])[1].train
    assert settings.data.batch_size == 12 and settings.recipe == "plain"
    assert settings.run.out == str(Path.home() / "runs" / "x")


def test_a_list_in_brackets_replaces_what_stands_before_it():
    parsed = _parse(["train", "--data.labeled", "a", "--data.labeled", "[b, c]"])[1].train
    assert parsed.data.labeled == ["b", "c"]


def test_a_recipe_is_found_wherever_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("recipe: paper\n")
    for flags in (["--recipe", "paper"], ["--recipe=paper"], ["--config=~/config.yaml"], ["--config", "~/config.yaml"]):
        assert _parse(["train", *flags])[1].train.meta.procedure == "daml3"
    assert main(["train", "--rec", "paper"]) == 2
    for settings in ("{recipe: paper}", "recipe: paper\n" * 30):
        assert main(["train", "--config", settings]) == 1
        assert "--config takes the path of a file, not settings" in capsys.readouterr().err


def test_a_section_may_stand_in_a_file_of_its_own(tmp_path, capsys):
    path, own = tmp_path / "config.yaml", tmp_path / "data.yaml"
    path.write_text("data: data.yaml\n")
    own.write_text("batch_size: 12\n")
    assert _parse(["train", "--config", str(path)])[1].train.data.batch_size == 12
    own.write_text("- 12\n")
    assert main(["train", "--config", str(path)]) == 1
    assert f"{own} is not the settings of data: it must be a YAML mapping" in capsys.readouterr().err


def test_each_flag_of_a_list_is_known_as_one():
    listed = {Paths, Paths | None, Sequence[str]}
    given_by_their_places = {"paths", "roots", "runs"}
    for name, (called, _) in ((name, each) for name, each in _COMMANDS.items() if name != "bench"):
        kinds = get_type_hints(DataConfig) if name == "train" else get_type_hints(resolve_name(called))
        flags = {flag for flag, kind in kinds.items() if kind in listed} - given_by_their_places
        prefix = "--data." if name == "train" else "--"
        assert {f"{prefix}{flag}" for flag in flags} == _FLAGS_OF_LISTS.get(name, {}).keys(), name


@pytest.mark.slow
def test_a_broken_image_stops_or_is_skipped_with_a_count(images, tmp_path, capsys):
    root = tmp_path / "broken"
    synthesize(root, ["campus"], identities=6, cameras=2, image_size=(32, 32), test_fraction=0.5)
    victim = next(iter(sorted((root / "campus" / "images").glob("*.jpg"))))
    victim.write_bytes(victim.read_bytes()[:200])
    assert main([*tiny_run(root, tmp_path / "stops"), "--optimizer.epochs", "4"]) == 1
    assert victim.name in capsys.readouterr().err
    assert main([*tiny_run(root, tmp_path / "skips"), "--optimizer.epochs", "4", "--data.broken_images", "skip"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"Skipped {victim}") == 1 and "Broken images skipped: 1." in printed


def test_a_broken_gallery_image_is_named_when_it_is_skipped(run, images, tmp_path, capsys):
    root = tmp_path / "target"
    synthesize(root, ["street"], identities=6, cameras=2, image_size=(32, 32), test_fraction=0.5)
    rows = [line.split(",") for line in (root / "street" / "manifest.csv").read_text().splitlines()]
    victim = root / "street" / next(row[0] for row in rows if row[3] == "gallery")
    victim.write_bytes(victim.read_bytes()[:100])
    checkpoint, target = run / "checkpoint.pt", str(root / "street")
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--targets", target, "--workers", "0"]) == 1
    assert victim.name in capsys.readouterr().err
    (row,) = evaluated(checkpoint, tmp_path / "figures.json", "--targets", target, "--broken_images", "skip")
    assert f"Skipped {victim}" in capsys.readouterr().out and row["skipped"] == [str(victim)]


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("train", ["lambda1", "the paper: 9000", "the paper: 500", "kappa1", "the paper: resnet50"]),
        (
            "train --recipe plain",
            ["the paper as printed", "default: plain", "default: daml1", "any part of DAN"],
        ),
        # In the order in which `plan_sweep` asks.
        ("sweep", ["without it that of the base, or else the grid's, or else dan"]),
    ],
)
def test_help_names_defaults_and_where_they_are_from(command, wanted, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [words for words in wanted if words not in text] == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --data.labeled x", "Continue with --run.resume true."),
        ("quickstart", "The same command goes on from here."),
    ],
)
def test_a_stop_names_how_to_go_on(command, words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", Mock(side_effect=Interrupted("Saved after iteration 3.")))
    assert main(command.split()) == 130
    assert capsys.readouterr().err == f"dan-fast: Saved after iteration 3. {words}\n"


def test_an_interrupt_while_flags_are_read_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_parse", Mock(side_effect=KeyboardInterrupt))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "dan-fast: interrupted.\n"
