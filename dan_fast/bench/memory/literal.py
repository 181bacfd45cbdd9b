"""The memory step as one writes it for speed in plain PyTorch: sample by sample, in place, without autograd.

It keeps to the paper's form: a slot is read when a key is compared with it and written when a key is stored. Beyond
that it takes what costs nothing: no copies, norms kept from one write to the next comparison, one product for all
retrievals from M. It does not work out norms and cosines after a write from those before, which is score space.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dan_fast.core.cosine import norm_from_square, occupied_softmax, statistics_dtype
from dan_fast.core.types import Gates, MemoryBatch, MemoryState, MemoryStep
from dan_fast.functional.memory.false_sets import FalseSampleSets


class InPlaceMemory:
    """M or M' that is changed in place; the tensors of its first state are taken over."""

    def __init__(self, state: MemoryState) -> None:
        self.features, self.labels, usage, evaluation, self.least_used, self.sample_ids = state
        self.dtype = statistics_dtype(self.features.dtype)
        self.usage, self.evaluation = usage.to(self.dtype), evaluation.to(self.dtype)

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Half-precision rows are widened once a batch: rounded after every sample they would lose the writes."""
        stored, self.features = self.features, self.features.to(self.dtype)
        self.measure()
        self.occupied = self.labels >= 0
        yield
        if self.features is not stored:
            stored.copy_(self.features)
        self.features = stored

    def measure(self) -> None:
        self.norms = norm_from_square(torch.linalg.vector_norm(self.features, dim=1).square_())

    def weights(self, keys: Tensor) -> Tensor:
        """exp(cos) normalised over the occupied slots, Eqs. (7) and (11); keys (d,) or (B, d)."""
        lengths = norm_from_square(keys.square().sum(-1, keepdim=True))
        return occupied_softmax(keys @ self.features.mT / (self.norms * lengths), self.occupied)

    def write(
        self, key: Tensor, label: Tensor, sample_id: Tensor | int, gate: Tensor, decay: float, trust: Tensor | float
    ) -> None:
        """Eqs. (5)-(10)."""
        slot = self.least_used[None]
        write = gate * torch.where(self.occupied, self.evaluation, 0.0)  # Eq. (8)
        write[slot] += 1 - gate
        self.features.index_fill_(0, slot, 0.0)  # Eq. (9)
        self.features.addr_(write, key)  # Eq. (10)
        self.measure()
        self.labels[slot], self.sample_ids[slot], self.occupied[slot] = label, sample_id, True
        self.evaluation = self.weights(key)
        self.usage.mul_(decay).add_(self.evaluation * trust).add_(write)
        self.least_used = self.usage.argmin()

    def clear_false(self, key: Tensor, pseudo_label: Tensor) -> Tensor:
        """Clears the false samples of Eq. (14); returns the second term of Eq. (15)."""
        if not (self.labels == pseudo_label).any():
            return key.new_zeros(())
        evaluation = self.weights(key)  # V
        sets = FalseSampleSets.form(evaluation[None], self.labels, pseudo_label[None])
        positive, negative = sets[0][0], sets[1][0]
        false = (positive | negative).nonzero()[:, 0]
        if not len(false):
            return key.new_zeros(())
        mean_positive, mean_negative = evaluation[positive].mean(), evaluation[negative].mean()
        self.features.index_fill_(0, false, 0.0)
        self.usage[false], self.occupied[false] = 0.0, False
        self.labels[false], self.sample_ids[false] = -1, -1
        self.least_used = self.usage.argmin()
        return -torch.log(mean_positive / (mean_positive + mean_negative))

    def retrieve(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. (11), (13) and (16) for all unlabelled samples: M does not change any more."""
        retrieval = self.weights(keys)
        pseudo_labels = self.labels[retrieval.argmax(1)]
        positive = self.labels == pseudo_labels[:, None]
        negative = self.occupied & ~positive
        mean_positive = (retrieval * positive).sum(1) / positive.sum(1)
        mean_negative = (retrieval * negative).sum(1) / negative.sum(1).clamp(min=1)
        return pseudo_labels, -torch.log(mean_positive / (mean_positive + mean_negative))

    def state(self) -> MemoryState:
        return MemoryState(self.features, self.labels, self.usage, self.evaluation, self.least_used, self.sample_ids)


@torch.no_grad()
def in_place_step(labeled: InPlaceMemory, unlabeled: InPlaceMemory, batch: MemoryBatch, gates: Gates) -> MemoryStep:
    """One mini-batch, Eqs. (5)-(16), by the rules of `dan_fast.reference.memory_step`, which also checks its arguments.

    Both memories advance; the states returned are the memories themselves.
    """
    keys, unlabeled_keys = batch.keys.to(labeled.dtype), batch.unlabeled_keys.to(labeled.dtype)
    alpha, alpha_unlabeled, beta = (torch.as_tensor(x, dtype=labeled.dtype, device=keys.device) for x in gates[:3])
    pseudo_labels, losses = torch.full_like(batch.sample_ids, -1), keys.new_zeros(0)
    with labeled.widened():
        for key, label in zip(keys, batch.labels, strict=True):
            labeled.write(key, label, -1, torch.sigmoid(alpha), gates.decay, 1.0)
        if len(unlabeled_keys) and bool(labeled.occupied.any()):
            pseudo_labels, losses = labeled.retrieve(unlabeled_keys)
    if len(losses):
        false_losses, gate = [], torch.sigmoid(alpha_unlabeled)
        with unlabeled.widened():
            for key, label, sample_id in zip(unlabeled_keys, pseudo_labels, batch.sample_ids, strict=True):
                false_losses.append(unlabeled.clear_false(key, label))
                unlabeled.write(key, label, sample_id, gate, gates.decay_unlabeled, beta)
        losses = losses + beta * torch.stack(false_losses)  # Eqs. (15) and (16)
    loss = losses.mean() if len(losses) else keys.new_zeros(())
    return MemoryStep(loss, pseudo_labels, labeled.state(), unlabeled.state())
