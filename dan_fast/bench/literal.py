"""The memory step as one writes it for speed in plain PyTorch: sample by sample, in place, without autograd.

It keeps to the paper's form: a slot is read when a key is compared with it and written when a key is stored. Beyond
that it takes what costs nothing: no copies, norms kept from one write to the next comparison, one product for all
retrievals from M. It does not work out norms and cosines after a write from those before, which is score space.
"""

import torch
from torch import Tensor

from dan_fast.core.cosine import norm_from_square, occupied_softmax, statistics_dtype
from dan_fast.core.types import MemoryState, MemoryStep


class _Memory:
    """A memory that is changed in place, in the dtype of statistics while a batch is written."""

    def __init__(self, state: MemoryState) -> None:
        self.stored = state.features
        self.dtype = statistics_dtype(state.features.dtype)
        self.features = state.features
        self.labels, self.sample_ids = state.labels, state.sample_ids
        self.usage, self.evaluation = state.usage.to(self.dtype), state.evaluation.to(self.dtype)
        self.least_used = state.least_used

    def open(self) -> None:
        """Half-precision rows are widened once a batch: rounded after every sample they would lose the writes."""
        self.features = self.stored.to(self.dtype)
        self.measure()
        self.occupied = self.labels >= 0

    def measure(self) -> None:
        self.square_norms = torch.linalg.vector_norm(self.features, dim=1).square_()

    def close(self) -> None:
        if self.features is not self.stored:
            self.stored.copy_(self.features)
        self.features = self.stored

    def scores(self, key: Tensor) -> Tensor:
        return self.features @ key

    def weights(self, scores: Tensor, length: Tensor) -> Tensor:
        """exp(cos) normalised over the occupied slots, Eqs. (7) and (11); scores (s,) or (B, s)."""
        return occupied_softmax(scores / (norm_from_square(self.square_norms) * length), self.occupied)

    def clear(self, slots: Tensor) -> None:
        self.features.index_fill_(0, slots, 0.0)
        self.square_norms.index_fill_(0, slots, 0.0)

    def write(
        self, key: Tensor, label: Tensor, sample_id: Tensor, gate: Tensor, decay: float, trust: Tensor | float
    ) -> None:
        """Eqs. (5)-(10)."""
        slot = self.least_used[None]
        write = gate * torch.where(self.occupied, self.evaluation, 0.0)  # Eq. (8)
        write[slot] += 1 - gate
        self.clear(slot)  # Eq. (9)
        self.features.addr_(write, key)  # Eq. (10)
        self.measure()
        self.labels[slot], self.sample_ids[slot], self.occupied[slot] = label, sample_id, True
        self.evaluation = self.weights(self.scores(key), norm_from_square(key.dot(key)))
        self.usage.mul_(decay).add_(self.evaluation * trust).add_(write)
        self.least_used = self.usage.argmin()

    def state(self) -> MemoryState:
        return MemoryState(self.stored, self.labels, self.usage, self.evaluation, self.least_used, self.sample_ids)


def _top(values: Tensor, count: int, occupied: Tensor) -> Tensor:
    """(s,) bool, the `count` largest of the occupied; the lowest index first among equals, which topk leaves open."""
    values = values.masked_fill(~occupied, -1.0)
    least = values.topk(count).values[-1]
    above, equal = values > least, values == least
    return above | (equal & (equal.cumsum(0) <= count - above.sum()))


class InPlaceMemory:
    """M and M' that step in place; the rules are `dan_fast.reference.memory_step`'s, which also checks its arguments.

    Args:
        labeled, unlabeled: the states to start from. Their tensors are taken over and changed.

    Example:
        >>> memory = InPlaceMemory(MemoryState.empty(4, 2), MemoryState.empty(4, 2))
        >>> keys, ids = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> memory.step(keys, torch.tensor([7]), keys, ids, 0.0, 0.0, 0.1).pseudo_labels
        tensor([7])
    """

    def __init__(self, labeled: MemoryState, unlabeled: MemoryState) -> None:
        self.labeled, self.unlabeled = _Memory(labeled), _Memory(unlabeled)

    @torch.no_grad()
    def step(
        self,
        keys: Tensor,
        labels: Tensor,
        unlabeled_keys: Tensor,
        sample_ids: Tensor,
        alpha: Tensor | float,
        alpha_unlabeled: Tensor | float,
        beta: Tensor | float,
        decay: float = 0.99,
        decay_unlabeled: float = 0.99,
    ) -> MemoryStep:
        """One mini-batch, Eqs. (5)-(16); both memories advance. The states returned are the memories themselves."""
        labeled, unlabeled = self.labeled, self.unlabeled
        keys, unlabeled_keys = keys.to(labeled.dtype), unlabeled_keys.to(labeled.dtype)
        alpha, alpha_unlabeled, beta = (
            torch.as_tensor(gate, dtype=labeled.dtype, device=keys.device) for gate in (alpha, alpha_unlabeled, beta)
        )
        no_sample = sample_ids.new_full((), -1)

        labeled.open()
        gate = torch.sigmoid(alpha)
        for key, label in zip(keys, labels, strict=True):
            labeled.write(key, label, no_sample, gate, decay, 1.0)
        pseudo_labels, losses = torch.full_like(sample_ids, -1), unlabeled_keys.new_zeros(0)
        if len(unlabeled_keys) and bool(labeled.occupied.any()):
            pseudo_labels, losses = self._retrieve(unlabeled_keys)
            unlabeled.open()
            gate = torch.sigmoid(alpha_unlabeled)
            false_losses = [
                self._write_unlabeled(key, pseudo_label, sample_id, gate, decay_unlabeled, beta)
                for key, pseudo_label, sample_id in zip(unlabeled_keys, pseudo_labels, sample_ids, strict=True)
            ]
            losses = losses + beta * torch.stack(false_losses)  # Eqs. (15) and (16)
            unlabeled.close()
        labeled.close()
        loss = losses.mean() if len(losses) else keys.new_zeros(())
        return MemoryStep(loss, pseudo_labels, labeled.state(), unlabeled.state())

    def _retrieve(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. (11), (13) and (16) for all unlabelled samples: M does not change any more."""
        memory = self.labeled
        retrieval = memory.weights(keys @ memory.features.mT, norm_from_square(keys.square().sum(1))[:, None])
        pseudo_labels = memory.labels[retrieval.argmax(1)]
        positive = memory.labels == pseudo_labels[:, None]
        negative = memory.occupied & ~positive
        mean_positive = (retrieval * positive).sum(1) / positive.sum(1)
        mean_negative = (retrieval * negative).sum(1) / negative.sum(1).clamp(min=1)
        return pseudo_labels, -torch.log(mean_positive / (mean_positive + mean_negative))

    def _write_unlabeled(
        self, key: Tensor, pseudo_label: Tensor, sample_id: Tensor, gate: Tensor, decay: float, beta: Tensor
    ) -> Tensor:
        """Clear the false samples of Eq. (14), write; the second term of Eq. (15)."""
        memory, loss = self.unlabeled, key.new_zeros(())
        scores = memory.scores(key)
        same = memory.labels == pseudo_label
        count = int(same.sum())
        if count:
            evaluation = memory.weights(scores, norm_from_square(key.dot(key)))  # V
            largest = _top(evaluation, count, memory.occupied)
            positive, negative = same & ~largest, memory.occupied & ~same & largest
            false = (positive | negative).nonzero()[:, 0]
            if len(false):
                mean_positive, mean_negative = evaluation[positive].mean(), evaluation[negative].mean()
                loss = -torch.log(mean_positive / (mean_positive + mean_negative))
                memory.clear(false)
                memory.usage[false], memory.occupied[false] = 0.0, False
                memory.labels[false], memory.sample_ids[false] = -1, -1
                memory.least_used = memory.usage.argmin()
        memory.write(key, pseudo_label, sample_id, gate, decay, beta)
        return loss
