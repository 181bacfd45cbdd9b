"""Short trainings on tiny images: their settings, how to stop one, and whether two have learnt the same."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import torch

from dan_fast.cli import main
from dan_fast.data import MiniBatch
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.checkpoint import load_checkpoint
from dan_fast.training.recipes import over

IMAGE_SIZE = (32, 32)


def config(images: Path, out: Path, **sections: dict[str, Any]) -> TrainConfig:
    """A training of few iterations on `images`; `sections` as in `TrainConfig.of_recipe`."""
    settings = {
        "data": {"labeled": str(images / "campus"), "unlabeled": str(images / "mall"), "image_size": IMAGE_SIZE,
                 "batch_size": 8, "workers": 0},
        "model": {"backbone": "timm:test_resnet", "weights": "none"},
        "memory": {"labeled_slots": 7, "unlabeled_slots": 5},
        "optimizer": {"epochs": 2, "lr_scale": 10.0},
        "run": {"out": str(out), "device": "cpu", "log_every": 1},
    }  # fmt: skip
    return TrainConfig.of_recipe("none", **over(settings, sections))


def command(out: Path, *flags: str) -> list[str]:
    """The words of `dan-fast train` for such a training of one epoch; `flags` say on what."""
    return [
        *("train", "--data.image_size", str(list(IMAGE_SIZE)), "--data.batch_size", "8", "--data.workers", "0"),
        *("--model.backbone", "timm:test_resnet", "--model.weights", "none", "--optimizer.epochs", "1"),
        *("--run.out", str(out), "--run.device", "cpu", *flags),
    ]


def evaluated(checkpoint: Path, figures: Path, *flags: str) -> list[dict]:
    """The rows that `dan-fast evaluate` writes to `figures`."""
    words = ["evaluate", "--checkpoint", str(checkpoint), "--out", str(figures), "--workers", "0", "--device", "cpu"]
    assert main([*words, *flags]) == 0
    return json.loads(figures.read_text())


class NoScalars:
    """Takes scalars and forgets them."""

    def add(self, name: str, value: object, counts: object = True) -> None:
        pass


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def stop_after(trainer: Trainer, iterations: int) -> None:
    """Send this process SIGINT, as Ctrl-C does, in the given iteration of the run."""
    step = trainer.train_iteration

    def interrupted(batch: MiniBatch, scalars: object) -> None:
        step(batch, scalars)
        if trainer.iterations_done + 1 == iterations:
            os.kill(os.getpid(), signal.SIGINT)

    trainer.train_iteration = interrupted


def has_logged(out: Path) -> bool:
    """Whether a run has logged an iteration or more."""
    return any(file.stat().st_size > 1000 for file in (out / "tensorboard").glob("*tfevents*"))


def assert_same_training(first: Path, second: Path) -> None:
    """Two runs' folders, or two checkpoints, hold the same bit for bit, but for where the training took place."""
    # "ran_under" is of the machine, and grows where a run goes on elsewhere.
    states = [load_checkpoint(_checkpoint(path)) | {"ran_under": None} for path in (first, second)]
    one, other = map(tensors_and_values, states)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.startswith(("/config/run", "/config/data/workers", "/config/data/cache")):
            continue
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def tensors_and_values(state: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dicts, lists and tuples by their paths."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in tensors_and_values(value, f"{prefix}/{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in tensors_and_values(value, f"{prefix}/{i}").items()}
    return {prefix: state}


def _checkpoint(path: Path) -> Path:
    return path / "checkpoint.pt" if path.is_dir() else path
