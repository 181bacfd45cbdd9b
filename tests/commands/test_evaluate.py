"""`dan-fast evaluate`: what cannot be evaluated is refused before anything is embedded."""

import io
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torchvision

from dan_fast.cli import main
from dan_fast.training.checkpoint import save_checkpoint
from tests.support.untrained import untrained_checkpoint
from tests.support.written_sets import cuhk03_of, manifest


@pytest.fixture
def nothing_embedded(monkeypatch) -> None:
    monkeypatch.setattr("dan_fast.commands.evaluate.extract_dataset", lambda *_, **__: pytest.fail("it embeds"))


def evaluated(checkpoint: Path, *targets: object, **flags: object) -> int:
    named = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    listed = f"[{', '.join(map(str, targets))}]"
    return main(["evaluate", "--checkpoint", str(checkpoint), "--targets", listed, "--workers", "0", "--device", "cpu",
                 *named])  # fmt: skip


def refused(capsys) -> str:
    """What was said of a mistake, in one sentence."""
    said = capsys.readouterr().err
    assert said.startswith("dan-fast: ") and said.count("\n") == 1
    return said.removeprefix("dan-fast: ").rstrip()


@pytest.mark.usefixtures("nothing_embedded")
def test_a_target_that_cannot_be_scored_is_refused_before_the_first_is_embedded(checkpoint, street, tmp_path, capsys):
    for name, parts, sentence in (
        ("learnt", {"train": [1, 1]}, "has neither query and gallery nor test images: name a dataset with a test"),
        ("asked", {"query": [1, 1]}, "has no gallery images: add them or evaluate on another dataset."),
        ("alone", {"query": [1, 2], "gallery": [1, 2]}, "has no person seen by two cameras in its evaluation images"),
        ("named", {"query": [1], "test": [1, 1]}, "name all of them query and gallery, or give these a manifest"),
        (
            "mixed",
            {"query": [1], "gallery": [2, 1], "test": [3, 3]},
            "has test images, which are split at random, beside",
        ),
    ):
        assert evaluated(checkpoint, street, manifest(tmp_path / name, **parts)) == 1
        said = refused(capsys)
        assert said.startswith(name) and sentence in said


@pytest.mark.usefixtures("nothing_embedded")
@pytest.mark.parametrize("split", ["query", "gallery", "test"])
def test_images_of_unknown_cameras_are_no_images_to_test_on(checkpoint, tmp_path, capsys, split):
    parts = {"test": [1, 1, 1]} if split == "test" else {"query": [1, 1], "gallery": [1, 1]}
    path = Path(manifest(tmp_path / "street", train=[5, 5], **parts)) / "manifest.csv"
    # In train, too, where they matter to nobody.
    text = path.read_text().replace("train0.jpg,5,0", "train0.jpg,5,-1")
    path.write_text(text.replace(f"{split}0.jpg,1,0", f"{split}0.jpg,1,-1"))
    assert evaluated(checkpoint, path.parent) == 1
    assert refused(capsys).startswith("1 images of street (")


@pytest.mark.usefixtures("nothing_embedded")
def test_a_single_shot_target_is_refused_what_is_not_defined_for_it(checkpoint, street, tmp_path, capsys):
    images = [f"1_00{person}_{side}_01.png" for person in (1, 2) for side in (1, 2)]
    split = {"train": images[:2], "query": images[2:], "gallery": images[2:]}
    target = f"{cuhk03_of(tmp_path / 'cuhk03', split, *[split] * 20)}@labeled classic 1"
    for flags, sentence in (
        ({"rerank": "true"}, "scored single-shot, with a gallery drawn anew many times, which is not re-ranked"),
        ({"ap": "trapezoid"}, "scored single-shot, for which ap trapezoid is not defined; leave it out."),
    ):
        assert evaluated(checkpoint, street, target, **flags) == 1
        assert sentence in refused(capsys)


@pytest.mark.usefixtures("nothing_embedded")
def test_a_shared_folder_has_no_network_before_training(street, tmp_path, capsys, monkeypatch):
    """Not even where a file in this folder has the name of the weights that the training started from."""
    monkeypatch.chdir(tmp_path)
    path = untrained_checkpoint(tmp_path / "checkpoint.pt", model={"weights": "/home/me/w.pth"})
    assert main(["share", "--checkpoint", str(path), "--out", "shared"]) == 0
    capsys.readouterr()
    torch.save(torchvision.models.resnet18().state_dict(), "w.pth")
    assert evaluated(Path("shared"), street, baselines="true") == 1
    assert refused(capsys) == (
        "shared is a shared folder, which does not hold the weights that its training started from (w.pth): evaluate "
        "it without --baselines, or the checkpoint.pt of the run."
    )


@pytest.mark.slow
@pytest.mark.usefixtures("capsys")
def test_figures_are_written_before_they_are_printed(checkpoint, street, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert evaluated(checkpoint, street, out=tmp_path / "figures.json") == 1
    assert len(json.loads((tmp_path / "figures.json").read_text())) == 1


@pytest.mark.slow
def test_a_shared_folder_of_a_training_from_no_weights_has_baselines(street, tmp_path, capsys):
    path = untrained_checkpoint(tmp_path / "checkpoint.pt", model={"weights": "none"})
    assert main(["share", "--checkpoint", str(path), "--out", str(tmp_path / "shared")]) == 0
    assert evaluated(tmp_path / "shared", street, baselines="true") == 0
    assert "street, untrained: " in capsys.readouterr().out


def test_a_name_in_brackets_is_shown_as_it_is(checkpoint, street, tmp_path, capsys):
    (tmp_path / "a [b]").symlink_to(street)
    assert evaluated(checkpoint, f'"{tmp_path / "a [b]"}"') == 0
    table, figures = capsys.readouterr().out.split("└")
    assert "│ a [b] " in table and "a [b], trained: " in figures


def test_a_network_that_has_diverged_is_a_sentence(checkpoint, street, tmp_path, capsys):
    state = torch.load(checkpoint)
    name = next(name for name in state["model"] if name.endswith("conv1.0.weight"))
    state["model"][name].fill_(torch.inf)
    save_checkpoint(tmp_path / "diverged.pt", state)
    assert evaluated(tmp_path / "diverged.pt", street) == 1
    assert "features are not finite numbers: its training has diverged" in capsys.readouterr().err


def test_what_is_done_is_said_before_a_later_target_fails(checkpoint, street, tmp_path, capsys, monkeypatch):
    told = []
    with monkeypatch.context() as patched:
        patched.setattr(
            "dan_fast.commands.evaluate.progress_line", lambda *_: nullcontext(lambda *done: told.append(done))
        )
        assert evaluated(checkpoint, street) == 0
    assert told and all(done == total > 1 for done, total in told)
    table, figures = capsys.readouterr().out, r"street, trained: R1 (\S+), R5 (\S+), R10 (\S+), mAP (\S+), mINP (\S+)"
    broken = manifest(tmp_path / "broken", query=[1, 1], gallery=[1, 1])
    assert evaluated(checkpoint, street, broken) == 1
    printed, said = capsys.readouterr()
    before, done, meanwhile, error = said.splitlines()
    assert (before, meanwhile) == tuple(f"Testing trained features on {name} ..." for name in ("street", "broken"))
    assert not printed and error.startswith("dan-fast: The image ")
    row = next(line for line in table.splitlines() if "trained" in line).replace("│", "").split()
    assert list(re.fullmatch(figures, done).groups()) == row[2:]
