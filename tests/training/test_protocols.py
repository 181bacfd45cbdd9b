"""Trainings and evaluations by the name of a protocol, and epochs chosen on the target, which say so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
import yaml

from dan_fast.cli import main
from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.fixed_splits import DIGESTS
from dan_fast.evaluation import Evaluation
from dan_fast.nn.weights_hash import weights_hash
from dan_fast.training import TrainConfig, Trainer, trained_network
from dan_fast.training import targets as targets_module
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.reported import CHOSEN, SEEN, EpochChoice, epoch_of
from dan_fast.training.shared import origin_of
from tests.support.dataset_shelf import full_shelf
from tests.support.figures import evaluation
from tests.support.training_runs import assert_same_training, command, config, evaluated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_shelf(tmp_path_factory.mktemp("shelf") / "datasets").root


def weights_of(out: Path) -> str:
    return weights_hash(trained_network(out / "checkpoint.pt")[0])


def flags(root: Path, out: Path, protocol: str) -> list[str]:
    return command(out, "--data.protocol", protocol, "--data.root", str(root))


@pytest.fixture(scope="module")
def p1(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "p1"
    assert main(flags(root, out, "p1")) == 0
    return out


# By protocol


def test_p1_from_its_name_to_four_targets_in_ten_splits_each(p1, root):
    results = json.loads((p1 / "results.json").read_text())
    assert (results["protocol"], results["epoch"], results["epochs"]) == ("p1", "epoch 1 of 1", 1)
    assert results["labeled"] == [
        *("Market-1501 (all images)", "CUHK02 (all images)"),
        *("CUHK03 (labeled, new protocol, all images)", "CUHK-SYSU (all images)"),
    ]
    assert results["unlabeled"] == [] and "last_epoch" not in results
    titles = {"viper": "VIPeR", "prid": "PRID", "grid": "GRID", "ilids": "i-LIDS"}
    for (name, title), target in zip(titles.items(), results["targets"], strict=True):
        assert target["dataset"] == title and target["repeats"] == 10
        assert target["splits"] == f"{name} {DIGESTS[name][:8]}"
        assert (target["named_protocol"], target["epoch"]) == ("p1", "epoch 1 of 1")
        assert target["mAP_std"] > 0 and len(target["cmc_std"]) == len(target["cmc"])
    assert yaml.safe_load((p1 / "config.yaml").read_text())["data"]["protocol"] == "p1"
    # Nobody of the targets has a class: 4 + 4 + 4 + 2 people.
    assert load_checkpoint(p1 / "checkpoint.pt")["num_classes"] == 14


def test_a_run_by_protocol_says_what_it_is_and_goes_on_when_the_datasets_move(root, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(flags(root, out, "p2-market1501")) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "Protocol p2-market1501: trained on MSMT17 (V1), CUHK03 (labeled, new protocol), CUHK-SYSU; tested on "
        "Market-1501." in printed
    )
    assert "Market-1501 (p2-market1501; fixed query and gallery; epoch 1 of 1): R1 " in printed
    moved = tmp_path / "moved"
    moved.symlink_to(root)
    assert main([*flags(moved, out, "p2-market1501"), "--run.resume", "true"]) == 0
    assert main([*flags(root, out, "p3-market1501"), "--run.resume", "true"]) == 1
    assert "was trained on other images" in capsys.readouterr().err


def test_unlabelled_datasets_of_a_protocol_fill_the_memory(root, tmp_path):
    settings = ("--recipe", "paper", "--memory.unlabeled_slots", "5")
    assert main([*flags(root, tmp_path / "run", "table6-market-to-duke"), *settings]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["labeled"], results["unlabeled"]) == (["Market-1501"], ["DukeMTMC-reID"])
    assert [target["dataset"] for target in results["targets"]] == ["DukeMTMC-reID"]
    assert load_checkpoint(tmp_path / "run/checkpoint.pt")["model"]["memory.unlabeled.labels"].shape == (5,)


def test_evaluate_by_protocol_gives_what_the_training_gave(root, tmp_path):
    out = tmp_path / "run"
    assert main(flags(root, out, "p2-cuhk03")) == 0
    of_protocol = ("--protocol", "p2-cuhk03", "--root", str(root))
    (row,) = evaluated(out / "checkpoint.pt", tmp_path / "figures.json", *of_protocol)
    assert row.pop("features") == "trained" and row.pop("weights") == weights_of(out)
    assert [row] == json.loads((out / "results.json").read_text())["targets"]
    assert (row["variant"], row["named_protocol"]) == ("labeled, new protocol", "p2-cuhk03")
    assert (row["metric"], row["ap"], row["precision"], row["rounding"]) == ("cosine", "standard", "float32", "")


def test_a_training_in_bfloat16_evaluates_as_the_command_does(images, tmp_path):
    out = tmp_path / "run"
    trainer = Trainer(chosen(images, out, precision="bfloat16", choose_epoch_on_target=False))
    trainer.epoch = trainer.config.optimizer.epochs
    trainer._save()
    trainer.config.run.resume = True
    Trainer(trainer.config).fit()
    results = json.loads((out / "results.json").read_text())
    assert (results["precision"], results["float32"]) == ("bfloat16", "IEEE")
    assert results["targets"][0]["precision"] == "float32"
    (row,) = evaluated(out / "checkpoint.pt", tmp_path / "figures.json", "--targets", str(images / "mall"))
    assert row.pop("features") == "trained" and row.pop("weights") == weights_of(out)
    assert [row] == results["targets"]


def test_a_network_trained_otherwise_has_no_figures_of_a_protocol(p1, root, tmp_path, capsys):
    of_protocol = ("--protocol", "p2-market1501", "--root", str(root), "--baselines", "true")
    rows = evaluated(p1 / "checkpoint.pt", tmp_path / "figures.json", *of_protocol)
    assert [row["named_protocol"] for row in rows] == ["targets of p2-market1501, NOT TRAINED BY IT", "", ""]
    assert [row["epoch"] for row in rows] == ["epoch 1 of 1", "", ""]
    # P-1 trains on all images of Market-1501.
    assert [row["seen"] for row in rows] == [f"2 {SEEN}", "", ""]
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "NOT TRAINED BY IT" in printed and f"2 {SEEN}" in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("train --data.protocol p1 --data.root / --data.labeled a --data.targets b",
         "data.protocol p1 and data.labeled, data.targets are both given"),
        ("train --data.protocol p1", "data.protocol p1 needs data.root"),
        ("train --data.root x --data.labeled a", "data.root x is of no use without data.protocol"),
        ("train --data.protocol p4 --data.root x", "no protocol 'p4'; choose one of table4"),
        ("train --data.protocol p1 --data.root /nowhere", "There is no folder /nowhere"),
        ("evaluate --checkpoint x --protocol p1 --root x --targets a", "protocol p1 and targets are both given"),
        ("evaluate --checkpoint x --protocol p1", "protocol p1 needs root"),
        ("evaluate --checkpoint x --targets a --root x", "root is of no use without protocol"),
        ("evaluate --checkpoint x", "targets is empty"),
        ("protocols --root /nowhere", "There is no folder /nowhere"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(arguments, sentence, capsys):
    assert main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_is_missing_stops_a_training_before_it_writes(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(flags(tmp_path / "empty", tmp_path / "run", "p1")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Market-1501" in error and "i-LIDS" in error
    assert not (tmp_path / "run").exists()


# Epochs chosen on the target


def chosen(images: Path, out: Path, **run) -> TrainConfig:
    """Three epochs, each of them evaluated, of which one is chosen on the target."""
    data = {"targets": str(images / "mall"), "batch_size": 16}
    run = {"evaluate_every": 1, "choose_epoch_on_target": True, **run}
    return config(images, out, data=data, optimizer={"epochs": 3}, run=run)


def score(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[dict[str, torch.Tensor]]:
    """Has evaluations of the trainer find these mAPs in turn; returns the weights they saw."""
    evaluate, left, seen = targets_module.evaluate_dataset, list(values), []

    def scored(embed, *arguments, **settings):
        network = embed.__self__
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return replace(evaluate(embed, *arguments, **settings), mAP=left.pop(0))

    monkeypatch.setattr(targets_module, "evaluate_dataset", scored)
    return seen


class Whole(NamedTuple):
    out: Path
    reported: list[Evaluation]
    seen: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A run of three epochs whose second is the best."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = score(patch, 0.2, 0.5, 0.4)
        return Whole(out, Trainer(chosen(images, out)).fit(), seen)


def test_the_best_epoch_is_reported_with_its_weights_and_says_so(whole, images, tmp_path, capsys):
    out, (reported,), seen = whole
    assert (reported.mAP, reported.epoch) == (0.5, f"epoch 2 of 3, {CHOSEN}")
    assert CHOSEN == "CHOSEN ON THE TARGET: not comparable"
    results = json.loads((out / "results.json").read_text())
    assert results["epoch"] == f"epoch 2 of 3, {CHOSEN}" and results["epochs"] == 3
    assert results["evaluate_every"] == 1
    assert [each["epoch"] for each in results["targets"]] == [f"epoch 2 of 3, {CHOSEN}"]
    assert [(each["mAP"], each["epoch"]) for each in results["last_epoch"]] == [(0.4, "epoch 3 of 3")]
    for name, key, epoch, precision, words in (
        ("chosen.pt", "chosen_weights", 2, 0.5, f"epoch 2 of 3, {CHOSEN}"),
        ("checkpoint.pt", "weights", 3, 0.4, "epoch 3 of 3"),
    ):
        network, _ = trained_network(out / name)
        torch.testing.assert_close(network.state_dict(), seen[epoch - 1], rtol=0, atol=0)
        assert results[key] == weights_hash(network)
        [shared] = origin_of(out / name, load_checkpoint(out / name), results[key])[1]
        assert shared.mAP == precision
        (row,) = evaluated(out / name, tmp_path / "figures.json", "--targets", str(images / "mall"))
        assert row["epoch"] == words
        table = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert ("CHOSEN" in table) == (name == "chosen.pt")


def test_an_epoch_chosen_by_an_earlier_run_is_not_taken_for_this_ones(whole, images, tmp_path, monkeypatch):
    out = shutil.copytree(whole.out, tmp_path / "run")
    (out / "checkpoint.pt").unlink()
    monkeypatch.setattr(Trainer, "train_iteration", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        Trainer(chosen(images, out, resume="auto")).fit()
    assert not (out / "chosen.pt").exists() and not (out / "results.json").exists()


def test_the_last_epoch_is_reported_unless_asked_otherwise(images, tmp_path, monkeypatch):
    score(monkeypatch, 0.9, 0.5, 0.4)
    (reported,) = Trainer(chosen(images, tmp_path / "run", choose_epoch_on_target=False)).fit()
    assert (reported.mAP, reported.epoch) == (0.4, "epoch 3 of 3")
    assert not (tmp_path / "run/chosen.pt").exists()
    assert "CHOSEN" not in (tmp_path / "run/results.json").read_text()


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_run_killed_at_its_best_evaluation_chooses_that_epoch(whole, images, tmp_path, monkeypatch, moment, capsys):
    offer = EpochChoice.offer

    def killed(self, evaluations, state, weights):
        if moment == "after" or state["epoch"] != 2:
            offer(self, evaluations, state, weights)
        if state["epoch"] == 2:
            raise Killed

    with monkeypatch.context() as patch:
        score(patch, 0.2, 0.5)
        patch.setattr(EpochChoice, "offer", killed)
        with pytest.raises(Killed):
            Trainer(chosen(images, tmp_path / "parts")).fit()
    with monkeypatch.context() as patch:
        # The second epoch is evaluated again.
        score(patch, 0.5, 0.4)
        capsys.readouterr()
        (reported,) = Trainer(chosen(images, tmp_path / "parts", resume=True)).fit()
    assert reported.epoch == f"epoch 2 of 3, {CHOSEN}"
    # Said once, at the end: that the second epoch will be chosen is not known before.
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(CHOSEN) == 1 and f"epoch 2 of 3, {CHOSEN}): R1 " in printed
    assert (tmp_path / "parts/results.json").read_text() == (whole.out / "results.json").read_text()
    for name in ("checkpoint.pt", "chosen.pt"):
        assert_same_training(whole.out / name, tmp_path / "parts" / name)


def found(mall: float, street: float) -> list[Evaluation]:
    """Evaluations of these mAPs."""
    each = {"mall": mall, "street": street}
    return [Evaluation.from_dict(evaluation(name, 0.5, precision)) for name, precision in each.items()]


def test_the_mean_over_the_targets_decides_and_figures_on_other_targets_are_dropped(tmp_path):
    state = {"config": TrainConfig().to_dict(), "iteration": 0}
    choice = EpochChoice(tmp_path / "chosen.pt", resume=False, targets=["mall", "street"])
    # Of equal ones the first.
    for epoch, evaluations in enumerate((found(0.1, 0.4), found(0.49, 0.0), found(0.4, 0.1)), start=1):
        choice.offer(evaluations, {**state, "epoch": epoch}, f"hash {epoch}")
    assert [each.epoch for each in choice.evaluations] == [f"epoch 1 of 500, {CHOSEN}"] * 2
    again = EpochChoice(tmp_path / "chosen.pt", resume=True, targets=["mall", "street"])
    assert again.evaluations == choice.evaluations and (again.weights, choice.weights) == ("hash 1", "hash 1")
    before = (tmp_path / "chosen.pt").read_bytes()
    others = "chosen.pt holds the epoch chosen on mall, street, and these targets are others: move it to another place"
    with pytest.raises(DanFastError, match=others):
        EpochChoice(tmp_path / "chosen.pt", resume=True, targets=["mall"])
    with pytest.raises(DanFastError, match=others):  # another set of the same name
        again.offer([replace(again.evaluations[0], num_query=7, mAP=1.0), again.evaluations[1]], {"epoch": 3}, "")
    assert (tmp_path / "chosen.pt").read_bytes() == before
    assert EpochChoice(tmp_path / "chosen.pt", resume=False, targets=["mall", "street"]).evaluations == []
    content = torch.load(tmp_path / "chosen.pt", weights_only=True)
    del content["evaluations"]
    torch.save(content, tmp_path / "chosen.pt")
    with pytest.raises(DanFastError, match="chosen.pt does not fit this version"):
        EpochChoice(tmp_path / "chosen.pt", resume=True, targets=["mall"])


def test_the_epoch_of_a_checkpoint_within_one():
    state = {"epoch": 3, "iteration": 40, "config": {"optimizer": {"epochs": 150}}}
    assert epoch_of(state) == "epoch 3 of 150 and 40 iterations"


def test_a_choice_needs_something_to_choose_from(images, tmp_path):
    setup = chosen(images, tmp_path / "run", evaluate_every=0)
    with pytest.raises(DanFastError, match="nothing to choose from: add run.evaluate_every, such as 10"):
        Trainer(setup)
    with pytest.raises(DanFastError, match="nothing to choose from: add data.targets or data.protocol"):
        Trainer(replace(chosen(images, tmp_path / "run"), data=replace(setup.data, targets=[])))
    assert not (tmp_path / "run").exists()
