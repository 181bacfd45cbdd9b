"""Trainings of a network without batch norm, whose ranks together do what one rank does."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import dan_fast.training.trainer as training
from dan_fast.nn import DAN
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.recipes import over
from tests.support.steps import TinyMap
from tests.support.training_runs import config

IMAGE_SIZE = (16, 16)


def settings(images: Path, out: Path, **sections: dict[str, Any]) -> TrainConfig:
    given = {
        "data": {"image_size": IMAGE_SIZE, "batch_size": 20, "iterations": 4},
        "memory": {"labeled_slots": 97, "unlabeled_slots": 50},
        "loss": {"labeled_embedding": 0.5},
        "meta": {"stall_guard": 1},
    }
    return config(images, out, **over(given, sections))


def trainer_of(config: TrainConfig, group: ProcessGroup | None, dropout: float = 0.0) -> Trainer:
    """A training of a network without batch norm, of which every rank's own images would be normalised."""

    def tiny_network(settings: dict[str, Any], num_classes: int, **_: bool) -> tuple[DAN, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings["run"]["seed"])
            network = DAN(num_classes, backbone=TinyMap(), image_size=IMAGE_SIZE, reduction=2, dropout=dropout)
            return network, torch.get_rng_state()

    made, training.network_and_random_state = training.network_and_random_state, tiny_network
    try:
        return Trainer(config, group)
    finally:
        training.network_and_random_state = made
