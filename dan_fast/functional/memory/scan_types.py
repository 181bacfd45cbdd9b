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


class ScanResult(NamedTuple):
    """No tensor but `loss` carries a gradient.

    With a fault nothing is written (`kept` 1, `held` 0), the loss is NaN and the pseudo labels are -1.
    """

    loss: Tensor  # () L_lde, the mean over unlabelled samples; 0 if there is none or all were skipped
    pseudo_labels: Tensor  # (B',) int64, -1: skipped
    fault: Tensor  # () int32, bit i: `STEP_FAULTS[i]`; 0: all is well
    labeled: WrittenSlots
    unlabeled: WrittenSlots


def sentence_of(fault: int) -> str:
    """What to tell whoever passed the value: the sentence of the lowest bit set in `fault`, which is not 0."""
    return STEP_FAULTS[(fault & -fault).bit_length() - 1]
