"""Settings that are said to change nothing: trainings with and without them learn the same bit for bit."""

from pathlib import Path

import pytest
import torch

from dan_fast.core.float32 import BFLOAT16_ON_A_CPU
from dan_fast.data.named_protocols import DatasetRoles
from dan_fast.data.samples import ReIDDataset
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.recipes import over
from dan_fast.training.reported import opening_lines
from dan_fast.training.without_effect import without_effect
from tests.support.training_runs import config

BASES = {
    "without memory": {"data": {"unlabeled": []}, "model": {"attention": "none", "adversary": False},
                       "meta": {"procedure": "daml1"}},
    "lending": {"model": {"style_mixing": "unlabeled"}, "loss": {"labeled_embedding": 1.0}},
    "without competition": {"model": {"adversary": False}, "loss": {"labeled_embedding": 1.0}},
    "spatial attention": {"model": {"attention": "spatial", "adversary": False}},
    "without L_lde": {"loss": {"embedding": 0.0}},
}  # fmt: skip
OF_PSEUDO_LABELS = {
    "data.feedback_fraction": 0.2,
    "memory.unlabeled_slots": 9,
    "memory.decay_unlabeled": 0.5,
    "loss.embedding": 2.0,
    "loss.regularizer": 2.0,
    "loss.confidence_prior": 2.0,
}
IDLE = {
    "without memory": OF_PSEUDO_LABELS | {
        "data.unlabeled_fraction": 0.25, "memory.labeled_slots": 9, "memory.decay": 0.5, "memory.gates": "features",
        "memory.initial_alpha": -4.0, "memory.temperature": 0.5, "model.reduction": 4, "loss.adversary": 2.0,
        "loss.adversary_reach": "attention", "meta.order": 2, "meta.eta": 0.5, "meta.stall_guard": 1,
        "meta.tie": "both", "model.style_mixing": "unlabeled", "model.feature": "pooled",
    },
    "lending": OF_PSEUDO_LABELS,
    "without competition": {"meta.stall_guard": 1, "meta.tie": "both", "loss.adversary": 2.0},
    "spatial attention": {"model.reduction": 4},
    "without L_lde": {"loss.confidence_prior": 2.0},
}  # fmt: skip
SETTINGS = sorted({setting for settings in IDLE.values() for setting in settings})


def sections_of(settings: dict[str, object]) -> dict[str, dict[str, object]]:
    sections: dict[str, dict[str, object]] = {}
    for setting, value in settings.items():
        name, key = setting.split(".")
        sections.setdefault(name, {})[key] = value
    return sections


def trained(images, out, sections) -> dict[str, torch.Tensor]:
    short = {"data": {"iterations": 2}, "optimizer": {"epochs": 1}}
    trainer = Trainer(config(images, out, **over(sections, short)))
    trainer.fit()
    network = trainer.model.network.eval()
    features = network.embed(torch.randn(2, 3, *network.image_size, generator=torch.Generator().manual_seed(0)))
    return {**network.state_dict(), "features": features}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_what_is_said_to_change_nothing_changes_nothing(base, images, tmp_path, capsys):
    expected = trained(images, tmp_path / "base", BASES[base])
    capsys.readouterr()
    found = trained(images, tmp_path / "run", over(BASES[base], sections_of(IDLE[base])))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    words = " ".join(capsys.readouterr().out.split())
    assert all(f"{setting} {value}" in words for setting, value in IDLE[base].items()) and " nothing w" in words


@pytest.mark.parametrize("setting", SETTINGS)
def test_of_what_has_an_effect_nothing_is_said(setting):
    (value,) = {settings[setting] for settings in IDLE.values() if setting in settings}
    sections = over(
        {"loss": {"labeled_embedding": 1.0}, "model": {"attention": "nl_cbam", "adversary": True}},
        sections_of({setting: value}),
    )
    given = TrainConfig.of_recipe("none", **over({"data": {"labeled": "x", "unlabeled": "y"}}, sections))
    assert list(without_effect(given, unlabeled=True)) == []


def test_without_attention_a_root_is_what_a_feature_can_change():
    roots = [("none", feature, 0) for feature in ("pooled_root", "pooled_whitened")]
    for recipe, feature, said in (("none", "pooled", 1), *roots, ("plain", "pooled", 0), ("dan", "pooled", 0)):
        model = {"feature": feature, "attention": "none", "adversary": False}
        given = TrainConfig.of_recipe(recipe, model=model)
        assert sum("model.feature" in line for line in without_effect(given, unlabeled=True)) == said


def test_a_feature_that_no_memory_whitens_is_named():
    for recipe, weight, unlabeled, said in (("plain", 0, True, 1), ("dan", 0, True, 1), ("dan", 1, False, 0),
                                            ("paper", 0, False, 1), ("paper", 0, True, 0)):  # fmt: skip
        given = {"model": {"feature": "pooled_whitened"}, "loss": {"labeled_embedding": float(weight)}}
        unlabeled = unlabeled and recipe != "plain"
        lines = without_effect(TrainConfig.of_recipe(recipe, **given), unlabeled)
        assert sum("pooled_whitened tests what pooled_root tests without a memory" in line for line in lines) == said


def test_a_meta_step_without_a_competition_has_an_order_and_a_weight():
    given = TrainConfig.of_recipe("dan", meta={"procedure": "daml2", "order": 2, "eta": 0.5, "tie": "both"})
    (line,) = without_effect(given, unlabeled=False)
    assert line.startswith("meta.tie both changes nothing where there is no competition")


def test_unlabelled_images_of_no_use_are_said_to_be():
    for mixing, loss, said in (("none", 0.0, True), ("batch", 0.0, False), ("none", 0.1, False)):
        changes = {"model": {"style_mixing": mixing}, "loss": {"regularizer": loss}}
        lines = list(without_effect(TrainConfig.of_recipe("dan", **changes), unlabeled=True))
        assert any("take places in the batches and part in no loss" in line for line in lines) is said


def test_a_share_of_no_unlabelled_images_is_of_no_use_and_no_share_of_some_is():
    said = []
    for share, sets in ((0.5, []), (0.0, ["b"]), (0.5, ["b"])):
        given = TrainConfig.of_recipe("dan", data={"unlabeled_share": share, "unlabeled": sets})
        said.append(list(without_effect(given, unlabeled=bool(sets and share))))
    assert said == [["data.unlabeled_share 0.5 changes nothing without unlabelled images."], [], []]


def test_what_a_recipe_sets_is_not_said():
    for recipe in ("dan", "paper", "plain"):
        assert list(without_effect(TrainConfig.of_recipe(recipe), unlabeled=False)) == []


def said_of(*targets: str, device: str = "cpu", **run: object) -> list[str]:
    datasets = DatasetRoles((), (), tuple(ReIDDataset(name, Path(name)) for name in targets))
    given = TrainConfig.of_recipe("plain", run=run)
    return list(opening_lines(given, datasets, torch.device(device), {"ran_under": []}))


def test_epochs_between_evaluations_are_of_no_use_without_targets():
    idle = "run.evaluate_every 5 changes nothing without data.targets or data.protocol."
    assert said_of(evaluate_every=5) == ["Recipe plain.", idle]
    assert (
        said_of("mall", evaluate_every=5) == [*said_of(), "mall: no images."] == ["Recipe plain.", "mall: no images."]
    )


def test_bfloat16_on_a_cpu_is_warned_of():
    assert said_of(precision="bfloat16") == ["Recipe plain.", BFLOAT16_ON_A_CPU]
    assert said_of(precision="bfloat16", device="cuda") == ["Recipe plain."]
