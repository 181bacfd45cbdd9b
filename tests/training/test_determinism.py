"""`run.deterministic`: what it and `memory.products` set and put back, what is refused, and equal bits on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dan_fast.core.errors import DanFastError
from dan_fast.data.synthetic import synthesize
from dan_fast.training import Interrupted, TrainConfig, Trainer
from dan_fast.training.determinism import deterministic_algorithms, prepare_cublas
from dan_fast.triton_kernels import products_now
from tests.support import ROOT
from tests.training.test_trainer import assert_same_state, stop_after

pytestmark = pytest.mark.slow

NAME = "CUBLAS_WORKSPACE_CONFIG"


def flags() -> tuple[bool, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )


def setup(root: Path, device: str, **run: object) -> TrainConfig:
    images = root / "images"
    if not images.exists():
        counts = {"identities": 6, "cameras": 2, "images_per_camera": 2, "test_fraction": 0.34}
        synthesize(images, ["campus", "mall"], image_size=(32, 32), seed=1, **counts)
    return TrainConfig.of_recipe(
        "none",
        data={"labeled": str(images / "campus"), "unlabeled": str(images / "mall"), "image_size": (32, 32),
              "batch_size": 8, "workers": 0},
        model={"backbone": "resnet18", "weights": "none"},
        memory={"labeled_slots": 7, "unlabeled_slots": 5},
        optimizer={"epochs": 2, "lr_scale": 10.0},
        run={"out": str(root / "run"), "device": device, "log_every": 1, **run},
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_sets_it_and_leaves_the_process_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool):
    before, seen = (*flags(), "float32"), []
    step = Trainer.train_iteration

    def watched(trainer: Trainer, *arguments: object) -> None:
        seen.append((*flags(), products_now()))
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "train_iteration", watched)
    config = setup(tmp_path, "cpu", deterministic=wanted)
    trainer = Trainer(replace(config, memory=replace(config.memory, products="tf32x3" if wanted else "float32")))
    assert (*flags(), products_now()) == before
    trainer.fit()
    inside = (True, False, False, False, before[4], "tf32x3") if wanted else before
    assert seen and set(seen) == {inside} and (*flags(), products_now()) == before


def test_an_operator_that_cannot_repeat_itself_is_named():
    values, indices = F.max_pool2d(torch.randn(1, 1, 4, 4), 2, return_indices=True)
    before = flags()
    with pytest.raises(DanFastError, match="^run.deterministic cannot be kept, max_unpool.* gives other bits"):
        with deterministic_algorithms(True):
            F.max_unpool2d(values, indices, 2)
    with pytest.raises(RuntimeError, match="^another"), deterministic_algorithms(True):
        raise RuntimeError("another")
    assert flags() == before


def test_cublas_gets_its_workspace_before_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, "")  # put back afterwards, whatever it was
    monkeypatch.delenv(NAME)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(DanFastError, match=f"{NAME}, which is not set and the GPU is in use already: set it to"):
        prepare_cublas()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare_cublas()
    assert os.environ[NAME] == ":4096:8"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare_cublas()
    monkeypatch.setenv(NAME, ":0:0")
    with pytest.raises(DanFastError, match=f"{NAME}, which is :0:0: set it to :4096:8"):
        prepare_cublas()


def train(root: str, name: str, device: str, order: int, *stops: int) -> None:
    """A run that is stopped after some of its iterations and resumed."""
    config = setup(Path(root), device, deterministic=True, out=str(Path(root) / name))
    config = replace(config, meta=replace(config.meta, order=order))
    for iteration in stops:
        trainer = Trainer(config)
        stop_after(trainer, iteration)
        with pytest.raises(Interrupted):
            trainer.fit()
        config = replace(config, run=replace(config.run, resume=True))
    Trainer(config).fit()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("order", [1, 2])
def test_a_run_on_a_gpu_resumes_bit_for_bit(tmp_path: Path, order: int):
    """Each in a process of its own, which has not used the GPU before."""
    for arguments in (("whole", "cuda", order), ("parts", "cuda", order, 2, 3)):
        code = f"from tests.training.test_determinism import train; train({str(tmp_path)!r}, *{arguments})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert_same_state(tmp_path / "whole/checkpoint.pt", tmp_path / "parts/checkpoint.pt")
