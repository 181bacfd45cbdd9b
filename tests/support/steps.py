"""A DAN of one convolution, with its memory, and batches for it: what a meta step needs, and no file."""

from typing import Any

import torch
from torch import Tensor, nn

from dan_fast.daml import Stage
from dan_fast.data import Split
from dan_fast.nn import DAN, ProgressiveAugmentedMemory
from dan_fast.training import LossConfig, MetaConfig, MetaStep, TrainingModel


class TinyMap(nn.Module):
    """A backbone of one convolution, so that a loss can be followed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).relu()


def tiny_network(**settings: Any) -> DAN:
    torch.manual_seed(0)
    return DAN(num_classes=3, backbone=TinyMap(), image_size=(8, 8), reduction=2, dropout=0.0, **settings)


def training_model(memory: bool = True, network: DAN | None = None, **weights: float) -> TrainingModel:
    """`weights` as in `LossConfig`."""
    network = network or tiny_network()
    held = ProgressiveAugmentedMemory(4, 4, key_dim=network.key_dim) if memory else None
    return TrainingModel(network, held, LossConfig(**weights))


def split(seed: int = 5) -> Split:
    """Three labelled, one fed-back and three unlabelled images."""
    torch.manual_seed(seed)
    return Split(
        images=torch.randn(7, 3, 8, 8),
        labels=torch.tensor([0, 1, 2, 1, -1, -1, -1]),
        sample_ids=torch.tensor([-1, -1, -1, 9, 4, 5, 6]),
        num_labeled=3,
        num_fed_back=1,
    )


def tiny_step(model: TrainingModel | None = None, lr: float = 0.1, **meta: Any) -> MetaStep:
    """A step with momentum and weight decay; `meta` as in `MetaConfig`."""
    model = model or training_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return MetaStep(model, optimizer, MetaConfig(**meta))


def decide(meta_step: MetaStep, *stages: Stage) -> None:
    """Have the competition end in these stages in turn, whatever the accuracies."""
    left = iter(stages)
    meta_step.competition.decide = lambda attention_won: next(left)
