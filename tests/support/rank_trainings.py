"""Trainings of a network without batch norm, whose ranks together do what one rank does."""

from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

import dan_fast.training.trainer as training
from dan_fast.training import TrainConfig, Trainer
from dan_fast.training.recipes import over
from tests.support.steps import TinyMap
from tests.support.tiny_training import IMAGE_SIZE, tiny_network
from tests.support.training_runs import config


def settings(images: Path, out: Path, **sections: dict[str, Any]) -> TrainConfig:
    given = {
        "data": {"image_size": IMAGE_SIZE, "batch_size": 20, "iterations": 4},
        "memory": {"labeled_slots": 97, "unlabeled_slots": 50},
        "model": {"feature": "pooled_whitened"},
        "loss": {"labeled_embedding": 0.5},
        "meta": {"stall_guard": 1},
    }
    return config(images, out, **over(given, sections))


def trainer_of(config: TrainConfig, group: ProcessGroup | None, dropout: float = 0.0) -> Trainer:
    """A training of a network without batch norm, of which every rank's own images would be normalised."""
    made, network = training.network_and_random_state, partial(tiny_network, backbone=TinyMap, dropout=dropout)
    training.network_and_random_state = network
    try:
        return Trainer(config, group)
    finally:
        training.network_and_random_state = made
