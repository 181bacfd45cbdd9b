"""Trainings that depart from the paper: labelled images in the memory, lent styles, the feature tested."""

import json
import shutil

import pytest
import torch

from dan_fast.core.errors import DanFastError
from dan_fast.reporting.curves import read_scalars
from dan_fast.training import Trainer, trained_network
from dan_fast.training.build import build_memory
from dan_fast.training.config import MemoryConfig
from tests.support.steps import tiny_network
from tests.support.training_runs import assert_same_training, config

pytestmark = pytest.mark.slow


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
        "model": {"style_mixing": "unlabeled", "feature": "pooled", "instance_norm": True},
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
            shutil.copy(trainer.folder.checkpoint, parts)

    trainer._save = keep_the_first
    trainer.fit()
    assert saved_after[0] == 3 and saved_after[-1] == 6
    Trainer(config(images, parts, **settings | {"run": {"resume": True}})).fit()
    assert_same_training(whole, parts)
    network, _ = trained_network(parts / "checkpoint.pt")
    assert network.feature == "pooled"


def test_images_that_lend_their_style_have_no_part_in_any_loss(images, tmp_path):
    settings = {"model": {"style_mixing": "unlabeled"}, "meta": {"procedure": "daml1"}}
    trainer = Trainer(config(images, tmp_path / "run", **settings))
    assert trainer.model.memory is None and trainer.model.lending
    seen = []
    stage = trainer.model.network.backbone.model.layer3
    handle = stage.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.fit()
    handle.remove()
    assert {maps.shape[0] for maps in seen if maps.requires_grad} == {4}  # of a batch of 8, half of it unlabelled
    scalars = read_scalars(tmp_path / "run")
    assert not any(scalars["train/loss/regularizer"][1]) and not any(scalars["train/loss/embedding"][1])


def test_a_batch_may_have_no_image_that_lends_its_style(images, tmp_path):
    settings = {"data": {"unlabeled_fraction": 0.09, "batch_size": 11}, "model": {"style_mixing": "unlabeled"}}
    trainer = Trainer(config(images, tmp_path / "run", **settings, meta={"procedure": "daml2"}))
    assert trainer.model.lending and trainer.batches.planner.places == [(5, 1), (5, 0)]
    # Their own are not mixed in its place.
    batch = next(iter(trainer.batches.of_epoch(0, None))).meta_test
    model = trainer.model.train()
    assert torch.equal(model.maps(batch), model.maps(batch))
    assert not torch.equal(model.network.maps(batch.images), model.network.maps(batch.images))


def test_the_feature_that_is_tested():
    images = torch.rand(2, 3, 8, 8)
    network = tiny_network(feature="pooled").eval()
    torch.testing.assert_close(network.embed(images), network(images).pooled)
    assert not torch.equal(network.embed(images), network(images).attended)
    signed = network.maps(images)
    signed = signed - signed.mean()
    network.feature, network.maps = "pooled_root", lambda *_: signed
    pooled, root = network(images).pooled, network.embed(images)
    assert (pooled < 0).any() and torch.equal(root.sign(), pooled.sign())
    torch.testing.assert_close(root.square(), pooled.abs())
    for setting in ("feature", "adversary_reach"):
        with pytest.raises(ValueError, match=f"{setting} must be"):
            tiny_network(**{setting: "neither"})


def test_no_style_is_lent_where_nothing_is_unlabelled(images, tmp_path):
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
    with pytest.raises(DanFastError, match="memory.initial_alpha -4.0 is for gates that are parameters"):
        build_memory(MemoryConfig(gates="features", initial_alpha=-4.0), key_dim=3)


def test_unlabelled_images_that_a_recipe_leaves_aside_are_named(images, tmp_path, capsys):
    for share, said in ((0.0, True), (1.0, False)):
        out = tmp_path / f"share {share}"
        settings = {"data": {"unlabeled_share": share}, "optimizer": {"epochs": 1}}
        Trainer(config(images, out, **settings)).fit()
        assert ("mall is left aside, because data.unlabeled_share is 0" in capsys.readouterr().out) is said
        assert json.loads((out / "results.json").read_text())["unlabeled"] == ([] if said else ["mall"])


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": {"labeled_embedding": 1.0, "embedding": 0.0}, "meta": {"procedure": "daml2"}},
        {"loss": {"labeled_embedding": 1.0}, "data": {"unlabeled": []}},
        {"loss": {"labeled_embedding": 1.0}, "model": {"style_mixing": "unlabeled"}},
    ],
    ids=["no weight", "no unlabelled images", "styles alone"],
)
def test_gates_that_nothing_trains_do_not_decay(images, tmp_path, settings):
    memory = {"initial_alpha": -4.0, "temperature": 0.1}
    trainer = Trainer(config(images, tmp_path / "run", **settings, memory=memory))
    trainer.fit()
    assert trainer.model.memory.alpha.item() == -4.0


def test_unlabelled_images_for_which_no_batch_has_a_place_are_refused(images, tmp_path):
    data = {"batch_size": 4, "unlabeled_fraction": 0.2}
    with pytest.raises(DanFastError, match="data.unlabeled_fraction 0.2 of data.batch_size 4 is none; raise one of"):
        Trainer(config(images, tmp_path / "run", data=data))
    Trainer(config(images, tmp_path / "run", data={**data, "unlabeled_share": 0.0}))
    Trainer(config(images, tmp_path / "run", data={**data, "batch_size": 8}))
