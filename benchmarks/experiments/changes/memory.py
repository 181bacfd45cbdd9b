"""What is written to the memory, what its losses are, and what leaves it."""

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from registry import HAD, change
from torch import Tensor, nn

from dan_fast.data import Split
from dan_fast.functional.memory import scan_torch
from dan_fast.functional.memory.false_sets import FalseSampleSets
from dan_fast.functional.memory.passes import memory_scores
from dan_fast.functional.memory.scan import MemoryScan
from dan_fast.nn import DAN, DANOutput, ProgressiveAugmentedMemory
from dan_fast.training import TrainingModel


@change
def keys_of_a_momentum_encoder() -> Iterator[None]:
    """What is written to M is made by a backbone whose parameters are 0.99 of what they were and 0.01 of the trained.

    For DAML1 with loss.labeled_embedding and without unlabelled images.
    """
    teachers: dict[int, nn.Module] = {}
    made: list[Tensor] = []
    maps, forward = TrainingModel.maps, ProgressiveAugmentedMemory.forward

    def maps_of_both(self: TrainingModel, split: Split) -> Tensor:
        student = self.network.backbone
        if id(student) not in teachers:
            teachers[id(student)] = copy.deepcopy(student).requires_grad_(False)
        teacher = teachers[id(student)]
        with torch.no_grad():
            torch._foreach_lerp_([*teacher.parameters()], [each.detach() for each in student.parameters()], 0.01)
            made[:] = [teacher(split.images).mean((2, 3))[:, : self.network.key_dim]]
        return maps(self, split)

    def written(self: ProgressiveAugmentedMemory, keys: Tensor, *arguments: Any, **options: Any) -> Any:
        HAD.add("keys_of_a_momentum_encoder")
        return forward(self, made[0][: len(keys)], *arguments, **options)

    with (
        patch.object(TrainingModel, "maps", maps_of_both),
        patch.object(ProgressiveAugmentedMemory, "forward", written),
    ):
        yield


@change
def projected_keys() -> Iterator[None]:
    """The keys of the memory are a projection of the pooled feature, of two layers; what is tested is the feature.

    As in SupCon (Khosla and others, NeurIPS 2020) and t-ReX (Sariyildiz and others, ICLR 2023), where the loss that
    draws persons together acts on features that are thrown away. For DAML1 with loss.labeled_embedding.
    """
    init = TrainingModel.__init__

    def with_projector(self: TrainingModel, network: DAN, *arguments: Any, **options: Any) -> None:
        init(self, network, *arguments, **options)
        size, keys = network.key_dim, network.keys
        with torch.random.fork_rng(devices=[]):
            first = nn.Linear(size, size, bias=False)
            self.projector = nn.Sequential(first, nn.BatchNorm1d(size), nn.ReLU(), nn.Linear(size, size))

        def projected(output: DANOutput) -> Tensor:
            HAD.add("projected_keys")
            return self.projector(keys(output).float())

        network.keys = projected

    with patch.object(TrainingModel, "__init__", with_projector):
        yield


@change
def uniform_slots() -> Iterator[None]:
    """Keys are driven away from the slots of other persons: + log mean exp(-2 |k - m|^2), both of length 1.

    The uniformity of Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
    Uniformity on the Hypersphere", ICML 2020, over M; a summand of loss.labeled_embedding.
    """
    labeled_loss = ProgressiveAugmentedMemory.labeled_loss

    def with_uniformity(
        self: ProgressiveAugmentedMemory, keys: Tensor, labels: Tensor, temperature: float, sizes: Any = None
    ) -> Tensor:
        state = self.labeled
        others = (state.labels >= 0) & (state.labels != labels[:, None])
        terms = labeled_loss(self, keys, labels, temperature, sizes)
        if not others.any(1).all():
            return terms
        HAD.add("uniform_slots")
        scores, squares = memory_scores(keys, state.features)
        cosines = scores / (keys.norm(dim=1, keepdim=True) * squares.sqrt()).clamp(min=1e-12)
        energy = (4 * cosines - 4).masked_fill(~others, -100.0).logsumexp(1) - others.sum(1).log()
        return terms + energy

    with patch.object(ProgressiveAugmentedMemory, "labeled_loss", with_uniformity):
        yield


@change
def margin_in_eq_14() -> Iterator[None]:
    """A sample is false where its cosine is 0.1 or more beyond the border of "the largest n" of Eq. (14).

    FP: below the least of the n largest; FN: above the largest of the others. Means of both as printed, 0 where one of
    the sets is empty. For unlabelled images with loss.embedding.
    """

    def sets(evaluation: Tensor, labels: Tensor, pseudo_labels: Tensor) -> tuple[Tensor, Tensor]:
        HAD.add("margin_in_eq_14")
        occupied = labels >= 0
        same = occupied & (labels == pseudo_labels[:, None])
        # Logarithms of the weights of one sample differ as its cosines do.
        cosines = evaluation.detach().log().masked_fill(~occupied, -torch.inf)
        largest = cosines.sort(dim=-1, descending=True).values
        beyond = F.pad(largest, (1, 1), value=-torch.inf)
        count = same.sum(-1, keepdim=True)
        least_inside, largest_outside = beyond.gather(-1, count), beyond.gather(-1, count + 1)
        return same & (cosines <= least_inside - 0.1), occupied & ~same & (cosines >= largest_outside + 0.1)

    def loss(weights: Tensor, false_positive: Tensor, false_negative: Tensor) -> Tensor:
        present = false_positive.any()
        positive, negative = (
            torch.where(present, (weights * each).sum() / each.sum().clamp(min=1), 0.5)
            for each in (false_positive, false_negative)
        )
        return torch.where(present, -torch.log(positive / (positive + negative)), 0.0)

    with (
        patch.object(MemoryScan, "serves", lambda *tensors: False),
        patch.object(FalseSampleSets, "form", sets),
        patch.object(scan_torch, "_false_loss", loss),
    ):
        yield
