"""`dan-fast share`: the checkpoint's network, its own figures with their caveats, and nothing of where files lay."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.data.synthetic import synthesize
from dan_fast.evaluation import Evaluation
from dan_fast.nn import DAN
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training import TrainConfig, trained_network
from dan_fast.training.build import initial_network
from dan_fast.training.checkpoint import load_checkpoint, save_checkpoint
from dan_fast.training.reported import CHOSEN, SEEN
from dan_fast.training.shared import origin_of
from tests.support.training_runs import evaluated

SIZE = (32, 32)


def figures(dataset: str, epoch: str, **changes) -> Evaluation:
    measured = Evaluation(dataset, "fixed query and gallery", (0.5, 0.75), 0.375, 0.25, None, None, None, 1, 4, 9, 4)
    return replace(measured, epoch=epoch, precision="float32", **changes)


def checkpoint(folder: Path, backbone: str = "timm:test_resnet", recipe: str = "dan", **state) -> Path:
    """The checkpoint of an untrained network, with figures of its epoch and of another one beside it."""
    config = TrainConfig.of_recipe(
        recipe,
        data={"labeled": ["/home/me/market", "/home/me/cuhk03@labeled new"], "image_size": SIZE, "cache": "/home/me/c"},
        model={"backbone": backbone, "weights": "/home/me/w.pth"},
        optimizer={"epochs": 3},
        run={"out": "/home/me/runs/x"},
    ).to_dict()
    network = initial_network(config, 7, read_weights=False)
    network.train()(torch.rand(3, 3, *SIZE))
    weights = {f"network.{name}": value for name, value in network.state_dict().items()}
    whole = {"config": config, "num_classes": 7, "preprocessing": network.preprocessing.to_dict(), "epoch": 3,
             "iteration": 0, "model": {**weights, "memory.beta_logit": torch.zeros(())}, **state}  # fmt: skip
    save_checkpoint(folder / "checkpoint.pt", whole)
    seen = figures("street", "epoch 3 of 3", seen=f"2 {SEEN}", skipped=("/home/me/street/a.jpg",))
    of_run = {
        "labeled": ["Market-1501", "CUHK03 (labeled new)"],
        "unlabeled": [],
        "targets": [figures("night", f"epoch 2 of 3, {CHOSEN}").to_dict()],
        "last_epoch": [seen.to_dict(), figures("lane|way", "epoch 3 of 3").to_dict()],
    }
    (folder / "results.json").write_text(json.dumps(of_run))
    return folder / "checkpoint.pt"


@pytest.mark.parametrize(
    ("backbone", "recipe"), [("resnet18", "paper"), ("timm:test_resnet", "paper"), ("timm:test_resnet", "dan")]
)
def test_the_features_are_those_of_the_checkpoint(backbone: str, recipe: str, tmp_path: Path):
    path, out = checkpoint(tmp_path, backbone, recipe), tmp_path / "shared"
    assert main(["share", "--checkpoint", str(path), "--out", str(out)]) == 0
    images = torch.rand(3, 3, *SIZE)
    wanted, settings = trained_network(path)
    assert wanted.feature == ("attended" if recipe == "paper" else "pooled_whitened")
    read, (of_folder, settings_of_folder) = DAN.from_pretrained(out), trained_network(out)
    for network in (read, of_folder):
        assert torch.equal(network.embed(images), wanted.embed(images))
        assert network.preprocessing == wanted.preprocessing and not network.training
    assert settings_of_folder["optimizer"] == settings["optimizer"]


def test_figures_of_these_weights_go_along_with_their_caveats(tmp_path: Path, capsys):
    path, out = checkpoint(tmp_path), tmp_path / "shared"
    assert main(["share", "--checkpoint", str(path), "--out", str(out)]) == 0
    assert (
        f"street: fixed query and gallery; 1 broken images left out; epoch 3 of 3; 2 {SEEN}." in capsys.readouterr().out
    )
    card, config = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
    assert (
        "night" not in card
        and f"37.5 | 25.0 | fixed query and gallery; 1 broken images left out; epoch 3 of 3; 2 {SEEN} |" in card
    )
    assert r"| lane\|way |" in card, "whose figures compare, and which parts no cell"
    assert "**Figures that are" in card and "- trained on: Market-1501, CUHK03 (labeled new)\n" in card
    assert "- method: recipe dan\n- weights of: epoch 3 of 3\n- persons with labels: 7\n" in card
    assert Evaluation.from_dict(config["results"][0]).skipped == ("a.jpg",)
    assert config["training"]["settings"]["data"]["labeled"] == ["market", "cuhk03@labeled new"]
    assert "/home" not in card + json.dumps(config) and str(tmp_path) not in card + json.dumps(config)
    again = tmp_path / "again"
    assert main(["share", "--checkpoint", str(out), "--out", str(again)]) == 0
    assert json.loads((again / "config.json").read_text()) == config


def test_figures_of_other_weights_in_the_folder_are_not_its_own(tmp_path: Path, capsys):
    path = checkpoint(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    network, state = trained_network(path)[0], load_checkpoint(path)
    for named, shared in ((weights_hash(network), True), ("0" * 32, False)):
        (tmp_path / "results.json").write_text(json.dumps(results | {"weights": named}))
        assert main(["share", "--checkpoint", str(path), "--out", str(tmp_path / f"out-{shared}")]) == 0
        assert ("| street |" in (tmp_path / f"out-{shared}/README.md").read_text()) == shared
        assert ("has any of this epoch and these weights" in capsys.readouterr().out) != shared
    assert origin_of(path, state, weights_hash(network))[0]["trained_on"] == ["market", "cuhk03@labeled new"]
    chosen = state | {"chosen": True, "evaluations": [figures("dusk", "epoch 3 of 3").to_dict()]}
    assert origin_of(path, chosen, weights_hash(network))[0]["trained_on"] == ["Market-1501", "CUHK03 (labeled new)"]


def test_the_chosen_epoch_says_so_and_an_epoch_without_figures_too(tmp_path: Path, capsys):
    epoch = f"epoch 2 of 3, {CHOSEN}"
    kept = [figures("dusk", epoch).to_dict()]
    path = checkpoint(tmp_path, epoch=2, chosen=True, evaluations=kept)
    assert main(["share", "--checkpoint", str(path), "--out", str(tmp_path / "chosen")]) == 0
    card = (tmp_path / "chosen/README.md").read_text()
    assert f"| dusk | 50.0 | nan | nan | 37.5 | 25.0 | fixed query and gallery; {epoch} |" in card
    assert f"- weights of: {epoch}\n" in card and load_checkpoint(tmp_path / "chosen")["chosen"]
    path = checkpoint(tmp_path, epoch=1)
    assert main(["share", "--checkpoint", str(path), "--out", str(tmp_path / "early")]) == 0
    assert "No figures go with it" in capsys.readouterr().out
    card = (tmp_path / "early/README.md").read_text()
    assert "No figures are recorded for these weights." in card and "**Figures" not in card


@pytest.mark.slow
def test_a_folder_evaluates_as_its_checkpoint_does(tmp_path: Path, capsys):
    synthesize(tmp_path, ["street"], identities=6, cameras=2, image_size=SIZE, test_fraction=1.0)
    path, target = checkpoint(tmp_path), ("--targets", str(tmp_path / "street"))
    assert main(["share", "--checkpoint", str(path), "--out", str(tmp_path / "shared")]) == 0
    (row,), (of_folder,) = (evaluated(each, tmp_path / "figures.json", *target) for each in (path, tmp_path / "shared"))
    assert of_folder == {**row, "seen": "persons trained on not recorded"}
    assert "epoch 3 of 3; persons trained on not recorded; recipe dan" in " ".join(capsys.readouterr().out.split())


def test_a_network_that_was_changed_after_its_training_is_not_read_as_that_of_its_settings(tmp_path: Path):
    path = checkpoint(tmp_path, recipe="plain")
    network, state = trained_network(path)[0], load_checkpoint(path)
    network.feature = "pooled"
    network.save_pretrained(tmp_path / "changed", training=origin_of(path, state)[0])
    assert DAN.from_pretrained(tmp_path / "changed").feature == network.feature
    with pytest.raises(DanFastError, match=f"changed holds a network of feature '{network.feature}' that was trained"):
        trained_network(tmp_path / "changed")


def test_what_is_wrong_is_one_sentence(tmp_path: Path, capsys, monkeypatch):
    path = checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)
    for arguments, sentence in [
        (["--out", "new", "--push", "me/net"], "--push needs huggingface_hub: pip install 'dan-fast[hub]'"),
        (["--out", "."], ". holds something else than a network of dan_fast, such as checkpoint.pt"),
        (["--out", "results.json"], "results.json is no folder to write to (Not a directory)"),
        (["--out", "new", "--checkpoint", "."], ". is the folder of a run: name the checkpoint.pt in it"),
        (["--out", "new", "--checkpoint", "/"], "/ has no config.json: name a folder that `dan-fast share`"),
    ]:
        assert main(["share", "--checkpoint", str(path), *arguments]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"dan-fast: {sentence}") and said.count("\n") == 1
    for damaged in (
        "{",
        '{"targets": 5}',
        '{"targets": [1]}',
        '{"targets": [{"epoch": "epoch 3 of 3"}]}',
        '{"labeled": [5]}',
        '{"labeled": "market"}',
    ):
        (tmp_path / "results.json").write_text(damaged)
        assert main(["share", "--checkpoint", str(path), "--out", "new"]) == 1
        said = capsys.readouterr().err
        assert "results.json is damaged (" in said and said.count("\n") == 1
    assert not Path("new").exists()
    # Figures of another epoch or network are not looked at.
    (tmp_path / "results.json").write_text('{"targets": [{"epoch": "epoch 1 of 3"}]}')
    assert origin_of(path, load_checkpoint(path))[1] == []
    (tmp_path / "results.json").write_text('{"weights": "of another", "targets": [1]}')
    assert origin_of(path, load_checkpoint(path), "of this one")[1] == []
    initial_network(load_checkpoint(path)["config"], 7, read_weights=False).save_pretrained("untold")
    with pytest.raises(DanFastError, match="untold does not say how its network was trained: read it with DAN.from"):
        load_checkpoint("untold")
    settings = load_checkpoint(path)["config"]
    for own in (
        {"settings": {"lr": 0.1}, "checkpoint": "a.pt"},
        {"settings": {}, "checkpoint": {"epoch": 3, "iteration": 0}},
        {"settings": settings, "checkpoint": {"epoch": 3}},
        {"recipe": "x"},
    ):
        DAN.from_pretrained("untold").save_pretrained("untold", training=own)
        with pytest.raises(DanFastError, match="untold does not say how its network was trained"):
            load_checkpoint("untold")


@pytest.mark.parametrize(("recipe", "unlabeled"), [("plain", []), ("dan", ["mall"])])
def test_without_results_the_sets_are_those_that_were_used_by_their_folders_names(recipe, unlabeled, tmp_path):
    data = {"labeled": ["/home/me/market/manifest.csv"], "unlabeled": ["/home/me/mall"]}
    config = TrainConfig.of_recipe(recipe, data=data, run={"checkpoint_every_s": float("inf")}).to_dict()
    training, _ = origin_of(tmp_path / "checkpoint.pt", {"config": config, "epoch": 1, "iteration": 0})
    assert (training["trained_on"], training["trained_without_labels_on"]) == (["market"], unlabeled)
    assert json.loads(json.dumps(training, allow_nan=False))["settings"]["run"]["checkpoint_every_s"] == "inf"


def test_datasets_that_their_folders_told_apart_are_numbered_alike_in_training_and_results(tmp_path: Path):
    path, shared = checkpoint(tmp_path), tmp_path / "shared"
    # A variant stands in brackets in a title, and so may a part of a folder's name.
    of_folders = ("bob/market", "alice/market", "frank/night (old)", "gail/night (old)", "street")
    tested = [*((name, "") for name in of_folders), ("carol/CUHK03", "new"), ("dan/CUHK03", "new")]
    found = [figures(name, "epoch 3 of 3", variant=variant).to_dict() for name, variant in tested]
    of_run = {
        "labeled": ["alice/market", "dan/CUHK03 (new)", "erin/CUHK03 (old)", "gail/night (old)"],
        "unlabeled": ["street", "bob/market"],
        "targets": found,
    }
    (tmp_path / "results.json").write_text(json.dumps(of_run))
    assert main(["share", "--checkpoint", str(path), "--out", str(shared)]) == 0
    config, card = json.loads((shared / "config.json").read_text()), (shared / "README.md").read_text()
    training, results = config["training"], [Evaluation.from_dict(each) for each in config["results"]]
    assert training["trained_on"] == ["market", "CUHK03 (new)", "CUHK03 (2) (old)", "night (old)"]
    assert training["trained_without_labels_on"] == ["street", "market (2)"]
    titles = ["market (2)", "market", "night (old) (2)", "night (old)", "street", "CUHK03 (3) (new)", "CUHK03 (new)"]
    assert [each.title for each in results] == titles
    assert [each.variant for each in results] == [variant for _, variant in tested]
    assert "- trained on: market, CUHK03 (new), CUHK03 (2) (old), night (old)\n" in card and "| market (2) |" in card
    folders = ("alice", "bob", "carol", "dan/", "erin", "frank", "gail")
    assert not [name for name in folders if name in card + json.dumps(config)]
    # Shared again they stay as they are, and those of a folder that has all names as they were become the same.
    state = load_checkpoint(shared)
    assert origin_of(shared, state) == (training, results)
    sets = {"trained_on": of_run["labeled"], "trained_without_labels_on": of_run["unlabeled"]}
    before = state | {"shared": state["shared"] | sets, "evaluations": found}
    assert origin_of(shared, before) == (training, results)


def test_paths_of_one_name_are_numbered_and_so_are_the_settings(tmp_path: Path):
    data = {
        "labeled": ["/home/me/a/market", "/home/me/b/market"],
        "unlabeled": ["/home/me/mall"],
        "targets": ["/home/me/b/market/manifest.csv", "/home/me/c/mall"],
    }
    config = TrainConfig.of_recipe("dan", data=data).to_dict()
    training, _ = origin_of(tmp_path / "checkpoint.pt", {"config": config, "epoch": 1, "iteration": 0})
    assert training["trained_on"] == training["settings"]["data"]["labeled"] == ["market", "market (2)"]
    assert training["settings"]["data"]["targets"] == ["market (2)", "mall (2)"]
