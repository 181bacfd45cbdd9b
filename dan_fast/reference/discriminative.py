"""L_lde for samples of known identity: the first term of Eq. (15) over the labelled memory."""

import math

import torch
from torch import Tensor

from dan_fast.core.checks import check_discriminative_loss
from dan_fast.core.cosine import norm_from_square, statistics_dtype
from dan_fast.reference.memory import zero_of


def discriminative_loss(keys: Tensor, labels: Tensor, slots: Tensor, slot_labels: Tensor, temperature: float) -> Tensor:
    """-log(P / (P + N)) of Eq. (15) for keys whose label is known, at a temperature.

    P is the mean of exp(cos(k, m) / temperature) over the slots of the key's label, as in Eq. (16), and N its sum over
    all other occupied slots: the mean of Eq. (16) would let thousands of wrong slots weigh as much as one.

    Args:
        keys: (B, d) floating.
        labels: (B,) int64, the label of each key; -1 where it is unknown.
        slots: (s, d), features of the memory, dtype and device of `keys`.
        slot_labels: (s,) int64, the labels of the slots; -1 is an empty slot, which takes no part.
        temperature: positive.

    Returns:
        (B,), float32 for half-precision keys, else their dtype. Where the label is unknown or the memory holds no slot
        of it, the loss and its gradient are 0.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit, or the temperature is not positive.

    Example:
        >>> slots, slot_labels = torch.eye(2), torch.tensor([4, 7])
        >>> discriminative_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([4]), slots, slot_labels, temperature=1.0)
        tensor([0.3133])
    """
    check_discriminative_loss(keys, labels, slots, slot_labels, temperature)
    dtype = statistics_dtype(keys.dtype)
    losses = []
    for key, label in zip(keys.to(dtype), labels.tolist(), strict=True):
        own = slot_labels == label
        if label < 0 or not own.any():
            losses.append(key.new_zeros(()))
            continue
        cosines = torch.stack([_direction(key) @ _direction(slot.to(dtype)) for slot in slots])
        # By logarithms: exp(1 / T) is no float32 at a T of 0.01.
        logits = cosines / temperature
        positive = logits[own].logsumexp(0) - math.log(int(own.sum()))
        negatives = logits[(slot_labels >= 0) & ~own]
        losses.append(torch.cat([positive[None], negatives]).logsumexp(0) - positive)
    return (torch.stack(losses) if losses else keys.new_zeros(0, dtype=dtype)) + zero_of(keys, slots)


def _direction(vector: Tensor) -> Tensor:
    return vector / norm_from_square(vector.square().sum())
