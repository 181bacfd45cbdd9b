"""One slot a person: the memory as it serves samples whose identity is known or was found by clustering."""

import torch
from torch import Tensor

from dan_fast.reference.cosine import norm_from_square, statistics_dtype
from dan_fast.reference.identity_checks import check_identities, check_momentum, check_temperature


def identity_loss(keys: Tensor, labels: Tensor, identities: Tensor, known: Tensor, temperature: float) -> Tensor:
    """The first term of Eq. (15) over a memory of one slot a person: -log(P / (P + N)), summed, not averaged.

    W^r of Eq. (11) with a temperature, softmax over the known identities of cos(k, m) / temperature. With one slot a
    person P is W^r of the sample's own identity and P + N is 1.

    Args:
        keys: (B, d) floating.
        labels: (B,) int64, the identity of each key; -1 where it has none.
        identities: (n, d), the slot of each identity, dtype and device of `keys`.
        known: (n,) bool, which identities have been written.
        temperature: positive.

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
    check_identities(keys, labels, identities, known)
    check_temperature(temperature)
    dtype = statistics_dtype(keys.dtype)
    losses = []
    for key, label in zip(keys.to(dtype), labels.tolist(), strict=True):
        if label == -1 or not known[label]:
            losses.append(key.new_zeros(()))
            continue
        cosines = torch.stack([_cosine(key, slot.to(dtype)) for slot in identities])
        weights = torch.exp(cosines / temperature) * known
        losses.append(-torch.log(weights[label] / weights.sum()))
    return torch.stack(losses) if losses else keys.new_zeros(0, dtype=dtype)


def write_identities(
    identities: Tensor, known: Tensor, keys: Tensor, labels: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Move the slots of the identities in a batch towards the mean direction of their keys.

    m := normalised(momentum m + (1 - momentum) mean of k / |k| over the batch's keys of the identity); an identity
    that was not known starts as that mean, normalised.

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
    check_identities(keys, labels, identities, known)
    check_momentum(momentum)
    dtype = statistics_dtype(keys.dtype)
    new, new_known = identities.detach().clone(), known.clone()
    for label in set(labels.tolist()) - {-1}:
        own = [_direction(key) for key in keys.detach().to(dtype)[labels == label]]
        mean = torch.stack(own).mean(0)
        if known[label]:
            mean = momentum * identities[label].detach().to(dtype) + (1 - momentum) * mean
        new[label] = _direction(mean)
        new_known[label] = True
    return new, new_known


def _direction(vector: Tensor) -> Tensor:
    return vector / norm_from_square(vector.square().sum())


def _cosine(key: Tensor, slot: Tensor) -> Tensor:
    return (_direction(key) * _direction(slot)).sum()
