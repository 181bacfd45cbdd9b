"""Who wins the competition, and what S and S~ differ in."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from registry import HAD, change
from torch import Tensor

import dan_fast.training.step as step_module
from dan_fast.daml import Stage, attention_wins
from dan_fast.data import BatchPlanner, TrainingSet
from dan_fast.data.sampler import BatchPlan
from dan_fast.data.samples import real_paths
from dan_fast.training import MetaStep
from dan_fast.training.batches import TrainingBatches
from dan_fast.training.metrics import accuracy, logit_norm
from dan_fast.training.objective import PassRecord, require_sound


@change
def running_accuracies() -> Iterator[None]:
    """The competition decides by accuracies averaged over iterations, 0.95 of what was and 0.05 of the new.

    For DAML3 with an adversary; attention wins a tie, and meta.tie decides nothing.
    """
    running: dict[str, float] = {}

    def compete(self: MetaStep, record: PassRecord) -> Stage:
        HAD.add("running_accuracies")
        require_sound(int(record.fault))
        for name, logits in (("attention", record.logits), ("adversary", record.adversary_logits)):
            new = float(accuracy(logits, record.labels))
            running[name] = 0.95 * running.get(name, new) + 0.05 * new
        return self.competition.decide(running["attention"] >= running["adversary"])

    with patch.object(MetaStep, "_compete", compete):
        yield


@change
def logits_of_equal_scale() -> Iterator[None]:
    """The cross-entropy that breaks a tie is that of logits of equal mean norm, the adversary's.

    For DAML3 with an adversary and meta.tie cross_entropy.
    """

    def wins(attention_logits: Tensor, adversary_logits: Tensor, labels: Tensor) -> Tensor:
        HAD.add("logits_of_equal_scale")
        scale = logit_norm(adversary_logits) / logit_norm(attention_logits).clamp(min=1e-12)
        return attention_wins(attention_logits * scale, adversary_logits, labels)

    with patch.object(step_module, "attention_wins", wins):
        yield


@change
def parted_by_camera() -> Iterator[None]:
    """S is the images of one half of a batch's cameras, drawn anew for each, and S~ those of the other half.

    For DAML2 without unlabelled images, of a source with two cameras or more. S~ may be the larger part.
    """
    with _parted("parted_by_camera", lambda training_set: [sample.camid for sample in training_set.labeled_samples]):
        yield


@change
def parted_by_source() -> Iterator[None]:
    """S is the images of one half of a batch's sources, drawn anew for each, and S~ those of the other half.

    For DAML2 without unlabelled images, of two labelled sources or more. S~ may be the larger part.
    """
    with _parted("parted_by_source", _sources):
        yield


def _sources(training_set: TrainingSet) -> list[int]:
    roots = [root + os.sep for root in training_set.roots]
    return [
        next(index for index, root in enumerate(roots) if path.startswith(root))
        for path in real_paths(training_set.labeled_samples)
    ]


@contextmanager
def _parted(name: str, origins_of: Callable[[TrainingSet], list[int]]) -> Iterator[None]:
    """Part each batch by the number that `origins_of` gives for each labelled image."""
    init, batches = TrainingBatches.__init__, BatchPlanner.batches

    def init_with_origins(self: TrainingBatches, config: Any, training_set: TrainingSet, *arguments: Any) -> None:
        init(self, config, training_set, *arguments)
        self.planner.origins = origins_of(training_set)

    def parted(self: BatchPlanner, epoch: int, feedback: tuple[Tensor, Tensor] | None = None) -> Iterator[BatchPlan]:
        generator = self._generator("cameras", epoch)
        for plan in batches(self, epoch, feedback):
            HAD.add(name)
            items = (*plan.meta_train, *plan.meta_test)
            origins = sorted({self.origins[item.index] for item in items})
            order = torch.randperm(len(origins), generator=generator).tolist()
            half = {origins[index] for index in order[: len(origins) // 2]}
            inside = [self.origins[item.index] in half for item in items]
            first = tuple(item for item, each in zip(items, inside, strict=True) if each)
            second = tuple(item for item, each in zip(items, inside, strict=True) if not each)
            # Batch norm needs two images in each.
            yield BatchPlan(first, second) if min(len(first), len(second)) > 1 else plan

    with patch.object(TrainingBatches, "__init__", init_with_origins), patch.object(BatchPlanner, "batches", parted):
        yield
