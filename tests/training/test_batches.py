"""What a run's settings make of its batches, and after which epochs its targets are due."""

from types import SimpleNamespace

import pytest
import torch

from dan_fast.data import TrainingSet, load_dataset
from dan_fast.training import TrainConfig, batches
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.targets import Targets
from tests.support.steps import tiny_network
from tests.support.written_sets import manifest


@pytest.fixture
def batches_of(tmp_path):
    labeled = load_dataset(manifest(tmp_path / "labeled", train=[0, 0, 0, 1, 1, 1, 2, 2, 2] * 4))
    training_set = TrainingSet([labeled], [load_dataset(manifest(tmp_path / "unlabeled", train=[5] * 9))])

    def of(seed: int = 0, **data: object) -> TrainingBatches:
        config = TrainConfig.of_recipe("none", data={"labeled": "there", "batch_size": 8, **data}, run={"seed": seed})
        return TrainingBatches(config, training_set, tiny_network(), torch.device("cpu"))

    return of


def test_the_order_is_that_of_the_seed(batches_of):
    plans = [batches_of(seed).planner.plan_epoch(0) for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize(("fraction", "fed_back"), [(0.0, 0), (0.5, 1), (1.0, 2)])
def test_as_many_are_fed_back_as_the_setting_allows(batches_of, fraction, fed_back):
    planner = batches_of(feedback_fraction=fraction).planner
    first = planner.plan_epoch(0, (torch.arange(9), torch.zeros(9, dtype=torch.int64)))[0]
    assert sum(item.kind == "fed_back" for item in first.meta_test) == fed_back


def test_images_are_read_as_the_settings_say(batches_of, monkeypatch):
    given = {}
    monkeypatch.setattr(batches, "training_loader", lambda *arguments, **named: given.update(named) or [])
    batches_of(workers=3, broken_images="skip").of_epoch(0, None)
    assert (given["workers"], given["broken_images"]) == (3, "skip")


@pytest.mark.parametrize(("every", "due"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7])])
def test_targets_are_due_every_so_many_epochs_and_after_the_last(every, due):
    config = TrainConfig.of_recipe(
        "none", data={"labeled": "there"}, optimizer={"epochs": 7}, run={"evaluate_every": every}
    )
    targets = Targets(config, SimpleNamespace(targets=()), None, torch.device("cpu"))
    assert [epoch for epoch in range(1, 8) if targets.are_due(epoch)] == due
