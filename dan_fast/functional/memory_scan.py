"""The memory step in score space: no sample touches the (s, d) memory.

Within a batch a slot only ever holds `m_i(t) = a_i m_i(0) + sum_u c_iu k_u`, so scores `<k_q, m_i>` and
squared norms can be carried along instead of the rows themselves. Writing k_t with weights w, the slots in C
cleared first, is

    scores[:, C] = 0,  n2[C] = 0;  n2 += 2 w scores[t] + w^2 <k_t, k_t>;  scores[q] += w <k_q, k_t>

and every rule of the paper is a function of scores, n2, the inner products of the keys, and labels. It is all
out of place PyTorch, differentiable any number of times.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.functional.memory_pending import MAX_PENDING, PendingMemory
from dan_fast.functional.memory_weights import false_sets
from dan_fast.reference.cosine import norm_from_square, occupied_softmax


class Gates(NamedTuple):
    """() tensors: raw alpha and alpha', and beta as it is used."""

    alpha: Tensor
    alpha_unlabeled: Tensor
    beta: Tensor


class _Scan:
    """One memory while the keys of a batch are written to it, in order."""

    def __init__(self, memory: PendingMemory, scores: Tensor, gram: Tensor) -> None:
        """`scores` (T, s) and `gram` (T, T) of the keys to be written, in the dtype of statistics."""
        self.memory = memory
        self.scores = scores  # of the keys still to come
        self.columns = gram.unbind(1)
        self.square_lengths = gram.diagonal().unbind()
        self.lengths = norm_from_square(gram.diagonal()).unbind()
        self.slots = torch.arange(memory.labels.numel(), device=memory.labels.device)
        self.square_norms = memory.norms().to(scores.dtype)
        self.labels, self.sample_ids = memory.labels, memory.sample_ids
        self.usage, self.least_used = memory.usage.to(scores.dtype), memory.least_used
        self.occupied = self.labels >= 0
        self.evaluation = memory.evaluation.to(scores.dtype).masked_fill(~self.occupied, 0.0)
        self.weights: list[Tensor] = []
        # The step in which a slot was last cleared: it holds nothing written before, and nothing of the base
        # unless this is still -1.
        self.cleared_at = torch.full_like(self.labels, -1)

    def weigh(self) -> Tensor:
        """(s,) attention of the next key over the memory before it is written."""
        cosine = self.scores[0] / (norm_from_square(self.square_norms) * self.lengths[len(self.weights)])
        return occupied_softmax(cosine, self.occupied)

    def drop(self, false: Tensor) -> None:
        """Forget the samples in the slots `false` (s,) bool; `write` completes the clearing."""
        self.labels = self.labels.masked_fill(false, -1)
        self.sample_ids = self.sample_ids.masked_fill(false, -1)
        self.usage = self.usage.masked_fill(false, 0.0)
        self.evaluation = self.evaluation.masked_fill(false, 0.0)
        self.occupied = self.occupied & ~false
        self.least_used = self.usage.argmin()

    def write(
        self,
        label: Tensor,
        sample_id: Tensor,
        gate: Tensor,
        decay: float,
        trust: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> None:
        """Write the next key, Eqs. (5)-(10); `trust` is beta of Eq. (12), `dropped` what `drop` was given."""
        step = len(self.weights)
        is_least_used = self.slots == self.least_used
        cleared = is_least_used if dropped is None else is_least_used | dropped
        keep = (~cleared).to(self.scores.dtype)
        weights = torch.lerp(is_least_used.to(keep.dtype), self.evaluation, gate)
        score, rest = (self.scores * keep).split([1, self.scores.shape[0] - 1])
        before = score[0]
        after = torch.addcmul(before, weights, self.square_lengths[step])
        # n2 + 2 w <k, m> + w^2 <k, k>, where `after` is <k, m> + w <k, k>.
        self.square_norms = torch.addcmul(self.square_norms * keep, weights, before + after)
        if self.memory.base.shape[1] == 1:
            # Numbers of opposite sign nearly cancel now and then, vectors do not, and n2 would lose twice the
            # digits that m loses. But here <k, m> = k m.
            length = self.square_lengths[step]
            exact = after.square() / torch.where(length > 0, length, 1.0)
            self.square_norms = torch.where(length > 0, exact, self.square_norms)
        self.scores = torch.addr(rest, self.columns[step][step + 1 :], weights)

        self.labels = torch.where(is_least_used, label, self.labels)
        self.sample_ids = torch.where(is_least_used, sample_id, self.sample_ids)
        self.occupied = self.occupied | is_least_used
        self.cleared_at = self.cleared_at.masked_fill(cleared, step)
        self.weights.append(weights)

        cosine = after / (norm_from_square(self.square_norms) * self.lengths[step])
        self.evaluation = occupied_softmax(cosine, self.occupied)
        read = self.evaluation.detach() if trust is None else trust.detach() * self.evaluation.detach()
        self.usage = decay * self.usage + (read + weights.detach())
        self.least_used = self.usage.argmin()

    def kept(self) -> Tensor:
        """(s,) 1, or 0 where the slot has been cleared."""
        return (self.cleared_at < 0).to(self.scores.dtype)

    def held(self) -> Tensor:
        """(T, s) what every slot holds of every key written."""
        steps = torch.arange(len(self.weights), device=self.slots.device)
        return torch.stack(self.weights) * (steps[:, None] >= self.cleared_at)

    def finish(self, keys: Tensor) -> PendingMemory:
        """The memory after the batch `keys` (T, d), detached."""
        if not self.weights:
            return self.memory
        old = self.memory
        return old.after(
            self.kept(),
            self.held().detach(),
            keys.detach(),
            labels=self.labels,
            sample_ids=self.sample_ids,
            usage=self.usage.to(old.usage.dtype),
            evaluation=self.evaluation.detach().to(old.evaluation.dtype),
            least_used=self.least_used,
            square_norms=self.square_norms.detach(),
        )


def _retrieve(cosine: Tensor, labels: Tensor, occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo labels (B',), Eq. (11), and -log(P / (P + N)) (B',), Eq. (16), from (B', s) cosines."""
    retrieval = occupied_softmax(cosine, occupied)
    pseudo_labels = labels[retrieval.argmax(-1)]
    positive = labels == pseudo_labels[:, None]
    negative = occupied & ~positive
    mean_positive = (retrieval * positive).sum(-1) / positive.sum(-1)
    mean_negative = (retrieval * negative).sum(-1) / negative.sum(-1).clamp(min=1)
    return pseudo_labels, -torch.log(mean_positive / (mean_positive + mean_negative))


def _false_loss(weights: Tensor, false_positive: Tensor, false_negative: Tensor) -> Tensor:
    """-log(FP / (FP + FN)) of Eq. (15); 0 if the sets are empty. They are equally many: sums do for means."""
    present = false_positive.any()
    positive = torch.where(present, (weights * false_positive).sum(), 1.0)
    negative = torch.where(present, (weights * false_negative).sum(), 0.0)
    return -torch.log(positive / (positive + negative))


def advance(
    labeled: PendingMemory,
    unlabeled: PendingMemory,
    keys: Tensor,
    labels: Tensor,
    unlabeled_keys: Tensor,
    sample_ids: Tensor,
    gates: Gates,
    decay: float,
    decay_unlabeled: float,
) -> tuple[Tensor | None, Tensor, PendingMemory, PendingMemory]:
    """One mini-batch, Eqs. (5)-(16), arguments as in `memory_step` and already checked; gates in its dtype.

    Returns:
        L_lde of every sample that was not skipped, (B',) or None if there is none; the pseudo labels (B',);
        and both memories with the writes of this batch pending.
    """
    for memory, rows in ((labeled, keys), (unlabeled, unlabeled_keys)):
        if memory.pending + rows.shape[0] > MAX_PENDING:
            memory.settle()
    wide, wide_unlabeled = keys.to(labeled.dtype), unlabeled_keys.to(labeled.dtype)
    batch, gram_unlabeled = keys.shape[0], wide_unlabeled @ wide_unlabeled.mT
    no_sample = sample_ids.new_full((), -1)

    # One read of M serves the writes and the retrievals.
    scores, retrieval_scores = labeled.scores(torch.cat([wide, wide_unlabeled])).split([batch, unlabeled_keys.shape[0]])
    scan = _Scan(labeled, scores, wide @ wide.mT)
    gate = torch.sigmoid(gates.alpha)
    for label in labels:
        scan.write(label, no_sample, gate, decay)
    new_labeled = scan.finish(keys)
    if unlabeled_keys.shape[0] == 0 or (batch == 0 and not bool(scan.occupied.any())):
        return None, torch.full_like(sample_ids, -1), new_labeled, unlabeled

    if batch:
        retrieval_scores = torch.addmm(retrieval_scores * scan.kept(), wide_unlabeled @ wide.mT, scan.held())
    lengths = norm_from_square(gram_unlabeled.diagonal())
    cosine = retrieval_scores / (lengths[:, None] * norm_from_square(scan.square_norms))
    pseudo_labels, losses = _retrieve(cosine, scan.labels, scan.occupied)

    scan = _Scan(unlabeled, unlabeled.scores(wide_unlabeled), gram_unlabeled)
    gate = torch.sigmoid(gates.alpha_unlabeled)
    false_losses = []
    for pseudo_label, sample_id in zip(pseudo_labels, sample_ids, strict=True):
        weights = scan.weigh()
        sets = false_sets(weights[None], scan.labels, pseudo_label[None])
        false_positive, false_negative = sets[0][0], sets[1][0]
        false_losses.append(_false_loss(weights, false_positive, false_negative))
        false = false_positive | false_negative
        scan.drop(false)
        scan.write(pseudo_label, sample_id, gate, decay_unlabeled, trust=gates.beta, dropped=false)
    losses = losses + gates.beta * torch.stack(false_losses)
    return losses, pseudo_labels, new_labeled, scan.finish(unlabeled_keys)
