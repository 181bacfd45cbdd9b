"""The memory of one slot a person for a whole batch, in PyTorch: one product of keys and slots is all it costs."""

import torch
from torch import Tensor

from dan_fast.functional.memory_stream import full_precision
from dan_fast.reference.cosine import norm_from_square, statistics_dtype
from dan_fast.reference.identity_checks import check_identities, check_momentum, check_temperature


def identity_loss(keys: Tensor, labels: Tensor, identities: Tensor, known: Tensor, temperature: float) -> Tensor:
    """The first term of Eq. (15) over a memory of one slot a person: -log(P / (P + N)), summed, not averaged.

    The same as `dan_fast.reference.identity_loss` for the whole batch; differentiable any number of times in keys and
    identities, whatever autocast says in the dtype of statistics.

    Args:
        keys: (B, d) floating.
        labels: (B,) int64, the identity of each key; -1 where it has none. A label out of range raises on the CPU; on
            a GPU and under `torch.compile`, where looking would wait, its loss is NaN.
        identities: (n, d), the slot of each identity, dtype and device of `keys`.
        known: (n,) bool, which identities have been written.
        temperature: positive; divides the cosines.

    Returns:
        (B,), float32 for half-precision keys, else their dtype; 0 without a gradient where the label is -1 or its
        identity is not known.

    Raises:
        TypeError, ValueError: a dtype, shape, device or label does not fit, or the temperature is not positive.

    Example:
        >>> slots, known = torch.eye(2), torch.tensor([True, True])
        >>> identity_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), slots, known, temperature=1.0)
        tensor([0.3133])
    """
    check_identities(keys, labels, identities, known, values=_may_look_at(labels))
    check_temperature(temperature)
    dtype, count = statistics_dtype(keys.dtype), identities.shape[0]
    with full_precision(keys.device):
        cosines = _directions(keys.to(dtype)) @ _directions(identities.to(dtype)).mT
        # A finite fill keeps a row without a known identity free of NaN in all derivatives.
        logits = (cosines / temperature).masked_fill(~known, -1e30)
        losses = -torch.log_softmax(logits, 1).gather(1, labels.clamp(0, count - 1)[:, None])[:, 0]
    taking_part = (labels >= 0) & known[labels.clamp(0, count - 1)]
    losses = torch.where(taking_part, losses, 0.0)
    if _may_look_at(labels):
        return losses
    return losses.masked_fill((labels < -1) | (labels >= count), torch.nan)


def write_identities(
    identities: Tensor, known: Tensor, keys: Tensor, labels: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Move the slots of the identities in a batch towards the mean direction of their keys.

    The same as `dan_fast.reference.write_identities`, in a time that does not depend on how many slots there are but
    for copying them; equal bits on repetition.

    Args:
        identities: (n, d); not changed.
        known: (n,) bool; not changed.
        keys: (B, d), dtype and device of `identities`.
        labels: (B,) int64, the identity of each key; -1 leaves the key out.
        momentum: in [0, 1), what stays of a slot.

    Returns:
        New `(identities, known)`, detached.

    Raises:
        TypeError, ValueError: a dtype, shape, device or label does not fit, or the momentum is out of range.

    Example:
        >>> slots, known = torch.zeros(2, 2), torch.tensor([False, False])
        >>> write_identities(slots, known, torch.tensor([[0.0, 3.0]]), torch.tensor([1]), momentum=0.2)
        (tensor([[0., 0.],
                [0., 1.]]), tensor([False,  True]))
    """
    check_identities(keys, labels, identities, known, values=_may_look_at(labels))
    check_momentum(momentum)
    if keys.shape[0] == 0:
        return identities.detach().clone(), known.clone()
    dtype = statistics_dtype(keys.dtype)
    with torch.no_grad(), full_precision(keys.device):
        # A slot more takes what belongs to nobody, so that no shape depends on the labels.
        count = identities.shape[0]
        rows = torch.where((labels >= 0) & (labels < count), labels, count)
        same = (rows[:, None] == rows).to(dtype)
        means = (same @ _directions(keys.detach().to(dtype))) / same.sum(1, keepdim=True)
        # Keys of one identity write one row: all of them what its first key found, to the last bit.
        means = means[same.argmax(1)]
        slots = torch.cat([identities, identities.new_zeros(1, identities.shape[1])])
        written = torch.cat([known, known.new_zeros(1)])
        moved = momentum * slots[rows].to(dtype) + (1 - momentum) * means
        slots[rows] = _directions(torch.where(written[rows, None], moved, means)).to(slots.dtype)
        written[rows] = True
    return slots[:count], written[:count]


def _directions(vectors: Tensor) -> Tensor:
    return vectors / norm_from_square(vectors.square().sum(1, keepdim=True))


def _may_look_at(labels: Tensor) -> bool:
    """Whether reading the labels neither waits for a device nor breaks a graph."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()
