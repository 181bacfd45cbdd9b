"""The memory step in score space, in PyTorch: no sample touches the (s, d) memory.

Within a batch a slot only ever holds `m_i(t) = a_i m_i(0) + sum_u c_iu k_u`, so scores `<k_q, m_i>` and
squared norms can be carried along instead of the rows themselves. Writing k_t with weights w, the slots in C
cleared first, is

    scores[:, C] = 0,  n2[C] = 0;  n2 += 2 w scores[t] + w^2 <k_t, k_t>;  scores[q] += w <k_q, k_t>

and every rule of the paper is a function of scores, n2, the inner products of the keys, and labels. It is all
out of place and reads nothing back to the host: differentiable any number of times, it serves any machine
without the kernels and the second derivatives of those with them.
"""

import torch
from torch import Tensor

from dan_fast.core.cosine import norm_from_square, occupied_softmax
from dan_fast.functional.memory.false_sets import FalseSampleSets
from dan_fast.functional.memory.scan_types import ScanInput, ScanResult, Slots, WrittenSlots
from dan_fast.functional.products import product


class _Writes:
    """One memory while the keys of a batch are written to it, in order."""

    def __init__(self, before: Slots, scores: Tensor, gram: Tensor, scalar_keys: bool) -> None:
        """`scores` (T, s) and `gram` (T, T) of the keys to be written."""
        self.before = before
        self.scores = scores  # of the keys still to come
        self.columns = gram.unbind(1)
        self.square_lengths = gram.diagonal().unbind()
        self.lengths = norm_from_square(gram.diagonal()).unbind()
        self.scalar_keys = scalar_keys
        self.slots = torch.arange(before.labels.numel(), device=before.labels.device)
        self.square_norms, self.usage = before.square_norms, before.usage
        self.labels, self.sample_ids, self.least_used = before.labels, before.sample_ids, before.least_used
        self.occupied = self.labels >= 0
        self.evaluation = before.evaluation.masked_fill(~self.occupied, 0.0)
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
        weights = gate * self.evaluation + (1 - gate) * is_least_used
        score, rest = (self.scores * keep).split([1, self.scores.shape[0] - 1])
        before = score[0]
        after = torch.addcmul(before, weights, self.square_lengths[step])
        # n2 + 2 w <k, m> + w^2 <k, k>, where `after` is <k, m> + w <k, k>.
        self.square_norms = torch.addcmul(self.square_norms * keep, weights, before + after)
        if self.scalar_keys:
            # Numbers of opposite sign nearly cancel now and then, vectors do not, and n2 would lose twice the
            # digits that m loses. But here <k, m> = k m.
            length = self.square_lengths[step]
            exact = after.square() / torch.where(length > 0, length, 1.0)
            self.square_norms = torch.where(length > 0, exact, self.square_norms)
        # Not addr, whose derivative is a product that autocast rounds on a GPU.
        self.scores = torch.addcmul(rest, self.columns[step][step + 1 :, None], weights)

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
        if not self.weights:
            return self.scores
        steps = torch.arange(len(self.weights), device=self.slots.device)
        return torch.stack(self.weights) * (steps[:, None] >= self.cleared_at)

    def result(self, undone: Tensor | None) -> WrittenSlots:
        """The memory after the batch, detached; as it was before where `undone` () bool is true."""
        after = WrittenSlots(
            self.square_norms, self.usage, self.evaluation, self.kept(), self.held(),
            self.labels, self.sample_ids, self.least_used,
        )  # fmt: skip
        if undone is not None:
            none_kept, none_held = torch.ones_like(after.kept), torch.zeros_like(after.held)
            old = WrittenSlots(*self.before[:3], none_kept, none_held, *self.before[3:])
            after = WrittenSlots(*(torch.where(undone, was, now) for was, now in zip(old, after, strict=True)))
        return WrittenSlots(*(x.detach() for x in after))


def _retrieve(cosine: Tensor, labels: Tensor, occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo labels (B',), Eq. (11), and -log(P / (P + N)) (B',), Eq. (16), from (B', s) cosines.

    -1 and 0 if no slot is occupied.
    """
    retrieval = occupied_softmax(cosine, occupied)
    pseudo_labels = torch.where(occupied.any(), labels[retrieval.argmax(-1)], -1)
    positive = occupied & (labels == pseudo_labels[:, None])
    negative = occupied & ~positive
    mean_positive = (retrieval * positive).sum(-1) / positive.sum(-1).clamp(min=1)
    mean_positive = torch.where(occupied.any(), mean_positive, 1.0)  # keeps every derivative finite
    mean_negative = (retrieval * negative).sum(-1) / negative.sum(-1).clamp(min=1)
    return pseudo_labels, -torch.log(mean_positive / (mean_positive + mean_negative))


def _false_loss(weights: Tensor, false_positive: Tensor, false_negative: Tensor) -> Tensor:
    """-log(FP / (FP + FN)) of Eq. (15); 0 if the sets are empty. They are equally many: sums do for means."""
    present = false_positive.any()
    positive = torch.where(present, (weights * false_positive).sum(), 1.0)
    negative = torch.where(present, (weights * false_negative).sum(), 0.0)
    return -torch.log(positive / (positive + negative))


def _fault(given: ScanInput) -> Tensor:
    """() int32, bit i for `STEP_FAULTS[i]`."""
    finite, gate_finite = given.gram.detach().diagonal().isfinite(), given.gates.detach().isfinite()
    batch = given.labels.numel()
    found = [
        ~finite[:batch].all(),
        ~finite[batch:].all(),
        (given.labels < 0).any(),
        (given.sample_ids < 0).any(),
        *(~gate_finite).unbind(),
        *((m.least_used < 0) | (m.least_used >= m.labels.numel()) for m in (given.labeled, given.unlabeled)),
    ]
    bits = torch.arange(len(found), device=given.gram.device)
    return (torch.stack(found).to(torch.int32) << bits).sum().to(torch.int32)


def scan(given: ScanInput) -> ScanResult:
    """One mini-batch through both memories, Eqs. (5)-(16)."""
    scores, gram, labels, sample_ids = given.scores, given.gram, given.labels, given.sample_ids
    batch, unlabeled_batch = labels.numel(), sample_ids.numel()
    no_sample = labels.new_full((), -1)
    alpha, alpha_unlabeled, beta = given.gates.unbind()
    fault = _fault(given)

    own_scores, retrieval_scores = scores.split([batch, unlabeled_batch])
    writes = _Writes(given.labeled, own_scores, gram[:batch, :batch], given.scalar_keys)
    gate = torch.sigmoid(alpha)
    for label in labels.unbind():
        writes.write(label, no_sample, gate, given.decay)
    new_labeled = writes.result(undone=fault != 0)

    retrieval_scores = product(gram[batch:, :batch], writes.held(), retrieval_scores * writes.kept())
    lengths = norm_from_square(gram.diagonal()[batch:])
    cosine = retrieval_scores / (lengths[:, None] * norm_from_square(writes.square_norms))
    pseudo_labels, losses = _retrieve(cosine, writes.labels, writes.occupied)
    undone = (fault != 0) | ~writes.occupied.any()

    writes = _Writes(given.unlabeled, given.unlabeled_scores, gram[batch:, batch:], given.scalar_keys)
    gate = torch.sigmoid(alpha_unlabeled)
    false_losses = [losses.new_zeros(0)]
    for pseudo_label, sample_id in zip(pseudo_labels.unbind(), sample_ids.unbind(), strict=True):
        weights = writes.weigh()
        sets = FalseSampleSets.form(weights[None], writes.labels, pseudo_label[None])
        false_positive, false_negative = sets[0][0], sets[1][0]
        false_losses.append(_false_loss(weights, false_positive, false_negative)[None])
        false = false_positive | false_negative
        writes.drop(false)
        writes.write(pseudo_label, sample_id, gate, given.decay_unlabeled, trust=beta, dropped=false)
    losses = losses + beta * torch.cat(false_losses)
    loss = losses.sum() / max(unlabeled_batch, 1)
    loss = torch.where(undone, 0.0, loss).masked_fill(fault != 0, torch.nan)
    return ScanResult(loss, pseudo_labels.masked_fill(fault != 0, -1), fault, new_labeled, writes.result(undone=undone))
