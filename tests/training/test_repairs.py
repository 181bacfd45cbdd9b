"""What departs from the paper in training: L_lde of labelled images, lent styles, L_aad's reach, the feature tested."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dan_fast.core.errors import DanFastError
from dan_fast.data import MiniBatch, training_loader
from dan_fast.data.synthetic import synthesize
from dan_fast.functional import discriminative_loss
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.reporting.curves import read_scalars
from dan_fast.training import LossConfig, Trainer, trained_network
from dan_fast.training.build import build_memory
from dan_fast.training.config import MemoryConfig
from dan_fast.training.objective import TrainingModel
from tests.training.test_trainer import IMAGE_SIZE, TinyMap, assert_same_state, config, split

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    synthesize(root, ["campus", "mall"], identities=6, cameras=2, images_per_camera=2, image_size=IMAGE_SIZE, seed=1,
               test_fraction=0.34)  # fmt: skip
    return root


def tiny_network(**settings) -> DAN:
    torch.manual_seed(0)
    return DAN(num_classes=3, backbone=TinyMap(), image_size=(8, 8), reduction=2, dropout=0.0, **settings)


def test_labelled_images_are_told_apart_by_the_memory_as_it_was_before_them():
    network = tiny_network()
    memory = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim)
    model = TrainingModel(network, memory, LossConfig(labeled_embedding=2.0), temperature=0.5)
    batch = split()
    first, _ = model(batch)
    assert first["labeled_embedding"] == 0.0  # M was empty
    before = memory.labeled
    losses, _ = model(batch)
    keys = network.keys(network(batch.images))[:3]  # not the fed-back one: its label is not the truth
    terms = discriminative_loss(keys, batch.labels[:3], before.features, before.labels, temperature=0.5)
    torch.testing.assert_close(losses["labeled_embedding"], 2.0 * terms.mean())
    parts = [losses[name] for name in ("classification", "adversary", "embedding", "regularizer", "labeled_embedding")]
    torch.testing.assert_close(losses["total"], sum(parts))
    gradient = torch.autograd.grad(losses["labeled_embedding"], network.backbone.conv.weight)[0]
    assert gradient.abs().sum() > 0


def test_without_unlabelled_images_the_memory_serves_the_labelled_ones(images, tmp_path):
    settings = {"data": {"unlabeled": []}, "loss": {"labeled_embedding": 1.0}, "memory": {"temperature": 0.1}}
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    trainer.fit()
    labels = trainer.model.memory.labeled.labels
    assert (labels >= 0).all() and int(trainer.model.memory.occupied_slots()[1]) == 0
    _, values = read_scalars(tmp_path / "run")["train/loss/labeled_embedding"]
    assert values[0] == 0.0 and values[-1] > 0.0
    assert Trainer(config(images, tmp_path / "other", data={"unlabeled": []})).model.memory is None


def test_a_run_with_every_repair_resumes_bit_for_bit(images, tmp_path):
    settings = {
        "model": {"style_mixing": "unlabeled", "feature": "pooled"},
        "loss": {"labeled_embedding": 1.0, "adversary_reach": "attention"},
        "memory": {"temperature": 0.1, "initial_alpha": -4.0},
        "data": {"iterations": 3},
        "run": {"checkpoint_every": 3},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer = Trainer(config(images, whole, **settings))
    save, saved_after = trainer._save, []

    def keep_the_first(wait: bool = True) -> None:
        save()
        saved_after.append(trainer.iterations_done)
        if len(saved_after) == 1:
            parts.mkdir()
            shutil.copy(trainer.checkpoint, parts)

    trainer._save = keep_the_first
    trainer.fit()
    assert saved_after[0] == 3 and saved_after[-1] == 6
    Trainer(config(images, parts, **settings | {"run": {"resume": True}})).fit()
    assert_same_state(whole / "checkpoint.pt", parts / "checkpoint.pt")
    network, _ = trained_network(parts / "checkpoint.pt")
    assert network.feature == "pooled"


def test_images_that_lend_their_style_have_no_part_in_any_loss(images, tmp_path):
    settings = {"model": {"style_mixing": "unlabeled"}, "meta": {"procedure": "daml1"}}
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    assert trainer.model.memory is None and trainer.model.lending
    seen = []
    handle = trainer.model.network.backbone.layer3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.fit()
    handle.remove()
    assert {maps.shape[0] for maps in seen if maps.requires_grad} == {4}  # of a batch of 8, half of it unlabelled
    scalars = read_scalars(tmp_path / "run")
    assert not any(scalars["train/loss/regularizer"][1]) and not any(scalars["train/loss/embedding"][1])


@pytest.mark.parametrize("reach, touched", [("all", True), ("attention", False)])
def test_whom_the_adversary_loss_reaches(reach, touched):
    network = tiny_network(adversary_reach=reach)
    batch = split()
    output = network(batch.images, batch.labels)
    names, parameters = zip(*network.named_parameters(), strict=True)
    grads = torch.autograd.grad(output.adversary_loss.sum(), parameters, allow_unused=True, retain_graph=True)
    reached = {name for name, grad in zip(names, grads, strict=True) if grad is not None and grad.abs().sum() > 0}
    outside = {"backbone.conv.weight", "backbone.conv.bias", "classifier.weight"}
    assert reached & outside == (outside if touched else set())
    assert any(name.startswith("attention.") for name in reached)
    # The loss itself and both branches are the same whomever it reaches.
    paper = tiny_network()(batch.images, batch.labels)
    for name in ("adversary_loss", "attended", "pooled", "logits"):
        torch.testing.assert_close(getattr(output, name), getattr(paper, name))
    assert torch.autograd.grad(output.logits.sum(), network.backbone.conv.weight)[0].abs().sum() > 0


def test_the_feature_that_is_tested():
    images = torch.rand(2, 3, 8, 8)
    network = tiny_network(feature="pooled").eval()
    torch.testing.assert_close(network.embed(images), network(images).pooled)
    assert not torch.equal(network.embed(images), network(images).attended)
    for setting in ("feature", "adversary_reach"):
        with pytest.raises(ValueError, match=f"{setting} must be"):
            tiny_network(**{setting: "neither"})


def test_nobody_lends_a_style_where_nothing_is_unlabelled(images, tmp_path):
    """A backbone whose styles cannot be mixed is refused only where there are styles to mix."""
    tokens = {"backbone": "timm:vit_tiny_patch16_224", "attention": "none", "adversary": False}
    settings = {"model": {"style_mixing": "unlabeled", **tokens}, "meta": {"procedure": "daml1"}}
    alone = config(images, tmp_path / "alone", **settings, data={"unlabeled": []}, optimizer={"epochs": 1})
    trainer = Trainer(alone)
    assert trainer.model.network.styles is None and not trainer.model.lending
    trainer.fit()
    network, _ = trained_network(tmp_path / "alone/checkpoint.pt")
    assert network.styles is None
    with pytest.raises(DanFastError, match="style_mixing to none and, where .*, data.unlabeled_share to 0"):
        Trainer(config(images, tmp_path / "both", **settings))


def test_gates_start_where_they_are_told():
    memory = build_memory(MemoryConfig(labeled_slots=2, unlabeled_slots=2, initial_alpha=-4.0), key_dim=3)
    assert (memory.alpha.item(), memory.alpha_unlabeled.item()) == (-4.0, -4.0)
    assert build_memory(MemoryConfig(gates="features"), key_dim=3).alpha is None


def test_unlabelled_images_that_a_recipe_leaves_aside_are_named(images, tmp_path, capsys):
    for share, said in ((0.0, True), (1.0, False)):
        out = tmp_path / f"share {share}"
        settings = {"data": {"unlabeled_share": share}, "optimizer": {"epochs": 1}}
        Trainer(config(images, out, **settings)).fit()
        assert ("mall is left aside, because data.unlabeled_share is 0" in capsys.readouterr().out) is said
        assert json.loads((out / "results.json").read_text())["unlabeled"] == ([] if said else ["mall"])


def test_a_classifier_that_no_loss_reaches_is_frozen_too(images, tmp_path, monkeypatch):
    settings = {"loss": {"adversary_reach": "attention"}, "meta": {"procedure": "daml3", "stall_guard": 0}}
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    classifier = trainer.model.network.classifier.weight
    # An iteration that moves it, so that it has momentum; then one that the adversary wins.
    monkeypatch.setattr("dan_fast.training.trainer.attention_wins", lambda *_: torch.tensor(True))
    batches = planned(trainer)
    trainer.train_iteration(batches[0], Ignored())
    before = classifier.detach().clone()
    monkeypatch.setattr("dan_fast.training.trainer.attention_wins", lambda *_: torch.tensor(False))
    attention = trainer.model.network.attention.wc1.detach().clone()
    trainer.train_iteration(batches[1], Ignored())
    assert torch.equal(classifier, before)
    assert not torch.equal(trainer.model.network.attention.wc1, attention)


def test_gates_that_nothing_trains_do_not_decay(images, tmp_path):
    settings = {
        "loss": {"labeled_embedding": 1.0, "embedding": 0.0},
        "memory": {"initial_alpha": -4.0, "temperature": 0.1},
        "meta": {"procedure": "daml2"},
    }
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    trainer.fit()
    assert trainer.model.memory.alpha.item() == -4.0
    with pytest.raises(DanFastError, match="memory.initial_alpha -4.0 is for gates that are parameters"):
        build_memory(MemoryConfig(gates="features", initial_alpha=-4.0), key_dim=3)


class Ignored:
    """Takes scalars and forgets them."""

    def add(self, name: str, value: object, counts: object = True) -> None:
        pass


def planned(trainer: Trainer) -> list[MiniBatch]:
    plans = trainer.planner.plan_epoch(0)
    return list(training_loader(trainer.training_set, plans, IMAGE_SIZE))
