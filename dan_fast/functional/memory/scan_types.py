"""What a scan of a batch through both memories takes and gives, whichever implementation does it."""

from typing import NamedTuple

from torch import Tensor

from dan_fast.core.checks import STEP_FAULTS


class Slots(NamedTuple):
    """One memory before a batch, without its features; floating tensors in the dtype of statistics."""

    square_norms: Tensor  # (s,) |m_i|^2
    usage: Tensor  # (s,)
    evaluation: Tensor  # (s,) W^e of the last write; what an empty slot holds is ignored
    labels: Tensor  # (s,) int64, -1: empty
    sample_ids: Tensor  # (s,) int64
    least_used: Tensor  # () int64


class WrittenSlots(NamedTuple):
    """The memory after the T keys of the batch: slot i holds `kept_i m_i + sum over u of held_ui k_u`."""

    square_norms: Tensor  # (s,)
    usage: Tensor  # (s,)
    evaluation: Tensor  # (s,)
    kept: Tensor  # (s,) 1, or 0 where the slot was cleared
    held: Tensor  # (T, s)
    labels: Tensor  # (s,) int64
    sample_ids: Tensor  # (s,) int64
    least_used: Tensor  # () int64


class ScanInput(NamedTuple):
    """One mini-batch, B labelled keys and B' unlabelled ones, in score space.

    The order is that of the operator `memory_scan`; tensors that carry a gradient come first.
    """

    scores: Tensor  # (B + B', s1) inner products of all keys, the labelled ones first, with the rows of M
    unlabeled_scores: Tensor  # (B', s2) of the unlabelled keys with the rows of M'
    gram: Tensor  # (B + B', B + B') inner products of the keys; only its lower triangle is read
    gates: Tensor  # (3,) raw alpha, raw alpha' and beta as it is used
    labels: Tensor  # (B,) int64
    sample_ids: Tensor  # (B',) int64
    labeled: Slots  # M before the batch
    unlabeled: Slots  # M' before the batch
    decay: float  # kappa1
    decay_unlabeled: float  # kappa2
    scalar_keys: bool  # whether a key is a single number, d = 1


class WriteRecord(NamedTuple):
    """What each of T writes leaves for the backward pass, (T, s) each."""

    before: Tensor  # <k_t, m_i> when sample t arrives, before anything is cleared
    weights: Tensor  # W^w of Eq. (8)
    evaluation: Tensor  # W^e after the write, 0 where empty
    square_norms: Tensor  # |m_i|^2 after the write
    events: Tensor  # uint8, bits of `Event` in csrc/memory/rules.h


class RetrievalRecord(NamedTuple):
    """What retrieval and the false sets leave for the backward pass."""

    scores: Tensor  # (B', s1) <k'_b, m_i> after all labelled writes
    sums: Tensor  # (B', 4) exp(cos) added over the slots of P, over those of N; how many slots P, N have
    false_sums: Tensor  # (B', 2) exp(cos) of V added over FP, over FN


class ScanResult(NamedTuple):
    """What a batch does to both memories.

    No tensor but `loss` carries a gradient.

    With a fault nothing is written (`kept` 1, `held` 0), the loss is NaN and the pseudo labels are -1.
    """

    loss: Tensor  # () L_lde, the mean over unlabelled samples; 0 if there is none or all were skipped
    pseudo_labels: Tensor  # (B',) int64, -1: skipped
    fault: Tensor  # () int32, bit i: `STEP_FAULTS[i]`; 0: all is well
    labeled: WrittenSlots
    unlabeled: WrittenSlots


def sentence_of(fault: int) -> str:
    """What an error says about a batch: the sentence of the lowest bit set in `fault`, which is not 0."""
    return STEP_FAULTS[(fault & -fault).bit_length() - 1]
