"""Which scalars an iteration leaves: losses, accuracies, the competition, the memory and its pseudo labels."""

import torch
from torch import Tensor

from dan_fast.daml import Stage, accuracies_tie
from dan_fast.data import TrainingSet
from dan_fast.nn import ProgressiveAugmentedMemory
from dan_fast.training.metrics import (
    cleared_a_sample,
    fed_back_right,
    logit_norm,
    pseudo_label_accuracy,
    pseudo_label_purity,
)
from dan_fast.training.objective import PassRecord
from dan_fast.training.scalars import Scalars
from dan_fast.training.step import StepResult


class StepScalars:
    """Puts what a step has found into `Scalars`, without a wait for the device.

    Args:
        training_set: whose true labels pseudo labels are compared with, where they are known.
        device: of the step.
        adversary: whether the network has an adversary branch.
    """

    def __init__(self, training_set: TrainingSet, device: torch.device, adversary: bool) -> None:
        self._training_set = training_set
        self._true_labels = training_set.true_labels.to(device)
        self._true_ids = training_set.true_ids.to(device)
        self._adversary = adversary

    def add(self, scalars: Scalars, result: StepResult) -> None:
        """The scalars of one step."""
        record = result.train_record
        self._add_pass(scalars, "train", result.train_losses, record)
        for branch, accuracy in result.accuracies.items():
            if branch != "adversary" or self._adversary:
                scalars.add(f"train/accuracy/{branch}", accuracy)
        scalars.add("train/logit_norm/attention", logit_norm(record.logits))
        if self._adversary:
            scalars.add("train/logit_norm/adversary", logit_norm(record.adversary_logits))
        if result.stage is not None:
            scalars.add("competition/attention_wins", float(result.stage is Stage.ATTENTION))
            scalars.add("competition/backbone_frozen", float(result.stage is Stage.ADVERSARY))
            scalars.add("competition/both_updated", float(result.stage is Stage.BOTH))
            tie = accuracies_tie(record.logits, record.adversary_logits, record.labels)
            scalars.add("competition/ties", tie)
        if result.test_record is not None:
            self._add_pass(scalars, "test", result.test_losses, result.test_record)

    def add_memory(self, scalars: Scalars, memory: ProgressiveAugmentedMemory) -> None:
        """What the memories hold; the device is waited for."""
        slots_labeled, slots_unlabeled = memory.occupied_slots()
        scalars.add("memory/slots_labeled", slots_labeled)
        scalars.add("memory/slots_unlabeled", slots_unlabeled)
        purity = pseudo_label_purity(*memory.reliable_samples(), self._training_set)
        if purity is not None:
            scalars.add("pseudo/purity", purity)

    def _add_pass(self, scalars: Scalars, name: str, losses: dict[str, Tensor], record: PassRecord) -> None:
        for loss, value in losses.items():
            scalars.add(f"{name}/loss/{loss}", value)
        if record.gates is not None:
            alpha, alpha_unlabeled, beta = record.gates
            scalars.add("memory/sigma_alpha", alpha)
            scalars.add("memory/sigma_alpha_unlabeled", alpha_unlabeled)
            scalars.add("memory/beta", beta)
            scalars.add("memory/cleared_a_sample", *cleared_a_sample(record))
        if record.spatial_spread is not None:
            scalars.add("attention/spatial_spread", record.spatial_spread)
        scalars.add("pseudo/accuracy", *pseudo_label_accuracy(record, self._true_labels))
        if len(record.fed_back_ids):
            scalars.add("pseudo/fed_back_right", *fed_back_right(record, self._true_labels, self._true_ids))
