"""A training leaves the process it runs in as it was: generators, handlers, settings."""

import ast
import random
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dan_fast.training import TrainConfig, Trainer, trained_network
from dan_fast.training.build import initial_network
from dan_fast.training.checkpoint import load_checkpoint
from tests.support import PACKAGE
from tests.support.training_runs import assert_same_training, config

pytestmark = pytest.mark.slow


def state_of_the_process() -> tuple:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    of_torch = [state.tolist() for state in (torch.get_rng_state(), *gpus)]
    settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return of_torch, random.getstate(), np.random.get_state()[1].tolist(), settings, handlers


def test_a_training_leaves_the_process_as_it_was(images: Path, tmp_path: Path):
    torch.manual_seed(7)
    before = state_of_the_process()
    setup = config(images, tmp_path / "run", optimizer={"epochs": 1})
    trainer = Trainer(setup)
    assert state_of_the_process() == before
    trainer.fit()
    assert state_of_the_process() == before
    trained_network(tmp_path / "run" / "checkpoint.pt")
    initial_network(setup.to_dict(), num_classes=3)
    assert state_of_the_process() == before

    trainer = Trainer(config(images, tmp_path / "broken"))
    trainer.train_iteration = None  # which cannot be called
    with pytest.raises(TypeError):
        trainer.fit()
    assert state_of_the_process() == before


def test_weights_depend_on_the_seed_of_the_run_alone():
    settings = TrainConfig()
    settings = replace(settings, model=replace(settings.model, backbone="resnet18", weights="none"))
    of_seeds = []
    for seed, of_process in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(of_process)
        settings.run.seed = seed
        of_seeds.append(initial_network(settings.to_dict(), 3).state_dict()["backbone.conv1.weight"])
    assert torch.equal(of_seeds[0], of_seeds[1]) and not torch.equal(of_seeds[0], of_seeds[2])


def test_no_generator_is_forked_or_seeded_but_those_that_are_named():
    """`fork_rng` without devices forks every GPU's and warns where there are several; `manual_seed` seeds them all."""
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "bench"):
            continue  # programs of their own
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                forks_all = called.endswith("fork_rng") and "devices" not in {each.arg for each in node.keywords}
                if forks_all or called in ("torch.manual_seed", "torch.cuda.manual_seed_all", "torch.seed"):
                    wrong.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {called}")
    assert wrong == []


@pytest.mark.gpu
def test_a_training_on_a_gpu_leaves_its_generators_as_they_were(images: Path, tmp_path: Path):
    torch.manual_seed(7)
    before = state_of_the_process()
    setup = config(images, tmp_path / "whole", run={"device": "cuda"})
    Trainer(setup).fit()
    assert state_of_the_process() == before
    saved = load_checkpoint(tmp_path / "whole" / "checkpoint.pt")["random"]["cuda"]
    assert len(saved) == 1 and saved[0].tolist() != before[0][1 + torch.cuda.current_device()]


def test_defaults_of_the_process_change_no_training(images: Path, tmp_path: Path):
    Trainer(config(images, tmp_path / "usual", optimizer={"epochs": 1})).fit()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")  # as a GPU would be
    try:
        Trainer(config(images, tmp_path / "other", optimizer={"epochs": 1})).fit()
        assert torch.get_default_dtype() == torch.float64 and torch.get_default_device().type == "meta"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert_same_training(tmp_path / "usual", tmp_path / "other")
