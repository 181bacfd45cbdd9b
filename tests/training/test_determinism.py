"""`run.deterministic`: what it and `memory.products` set and put back, what is refused, and equal bits on a GPU."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dan_fast.commands import train as train_command
from dan_fast.core.errors import DanFastError
from dan_fast.training import DataConfig, Interrupted, RunConfig, TrainConfig, Trainer
from dan_fast.training.determinism import deterministic_algorithms, prepare_cublas
from dan_fast.triton_kernels import products_now
from tests.support import ROOT
from tests.support.training_runs import assert_same_training, config, stop_after

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


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_sets_it_and_leaves_the_process_as_it_was(images: Path, tmp_path: Path, monkeypatch, wanted: bool):
    before, seen = (*flags(), "float32"), []
    step = Trainer.train_iteration

    def watched(trainer: Trainer, *arguments: object) -> None:
        seen.append((*flags(), products_now()))
        step(trainer, *arguments)

    monkeypatch.setattr(Trainer, "train_iteration", watched)
    memory = {"products": "tf32x3" if wanted else "float32"}
    trainer = Trainer(config(images, tmp_path / "run", memory=memory, run={"deterministic": wanted}))
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


def test_cublas_gets_its_workspace_before_ranks_take_their_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(NAME, "")
    monkeypatch.delenv(NAME)
    settings, found = TrainConfig(data=DataConfig(labeled=["market"]), run=RunConfig(deterministic=True)), []

    @contextmanager
    def joined(device):
        found.append(os.environ.get(NAME))
        yield None

    monkeypatch.setattr(train_command, "resolve_device", lambda name: torch.device("cuda:0"))
    monkeypatch.setattr(train_command, "joined", joined)
    monkeypatch.setattr(train_command, "Trainer", lambda *arguments: SimpleNamespace(fit=lambda: None))
    train_command.train(settings)
    assert found == [":4096:8"]


def train(images: str, out: str, device: str, order: int, *stops: int) -> None:
    """A run that is stopped after some of its iterations and resumed."""
    run = {"device": device, "deterministic": True}
    for iteration in (*stops, None):
        trainer = Trainer(config(Path(images), Path(out), meta={"order": order}, run=run))
        if iteration is None:
            trainer.fit()
            return
        stop_after(trainer, iteration)
        with pytest.raises(Interrupted):
            trainer.fit()
        run["resume"] = True


@pytest.mark.gpu
@pytest.mark.parametrize("order", [1, 2])
def test_a_run_on_a_gpu_resumes_bit_for_bit(images: Path, tmp_path: Path, order: int):
    """Each in a process of its own, which has not used the GPU before."""
    for out, stops in (("whole", ()), ("parts", (2, 3))):
        arguments = (str(images), str(tmp_path / out), "cuda", order, *stops)
        code = f"from tests.training.test_determinism import train; train(*{arguments})"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
