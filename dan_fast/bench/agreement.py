"""Do two contenders say the same? Without that a ratio of their times means nothing."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 4096


class Agreement(NamedTuple):
    """What differs beyond its tolerance and by how much, None if nothing does; and the error of each result."""

    disagrees: str | None
    errors: dict[str, float]


def compare_tensors(
    results: Iterable[tuple[str, Tensor, Tensor, float | None]], *orders: float, different: Sequence[str] = ()
) -> Agreement:
    """Names the results that differ, after what is `different` in any case; errors are `relative_error`s.

    A result is its name, the tensor, the one wanted, and the error allowed; None: every number has to be equal.

    Example:
        >>> compare_tensors([("labels", torch.tensor([1, 2]), torch.tensor([1, 3]), None)]).disagrees
        'labels in 1 of 2 places'
    """
    errors, allowed, different = {}, {}, list(different)
    for name, actual, wanted, limit in results:
        if limit is not None:
            errors[name], allowed[name] = relative_error(actual, wanted, *orders), limit
        elif actual.shape != wanted.shape:
            different.append(f"shape of {name}")
        elif count := int((actual != wanted).sum()):
            different.append(f"{name} in {count} of {actual.numel()} places")
    return Agreement("; ".join([*different, *too_large(errors, allowed)]) or None, errors)


def too_large(errors: Mapping[str, float], allowed: Mapping[str, float], of: str = "") -> list[str]:
    """The errors that are larger than allowed, in words; `of` stands before their names."""
    # `not <=` so that NaN is wrong.
    wrong = (name for name, error in errors.items() if not error <= allowed[name])
    return [f"{of}{name} by {errors[name]:.1e} (allowed {allowed[name]:.1e})" for name in wrong]


def relative_error(actual: Tensor, wanted: Tensor, *orders: float) -> float:
    """The norm of the difference as a share of that of `wanted`, the largest over the orders; inf: the largest number.

    NaN for another shape.
    """
    if actual.shape != wanted.shape:
        return math.nan
    if wanted.numel() == 0:
        return 0.0
    norm, found = torch.linalg.vector_norm, []
    # In pieces: a difference of whole memories would need as much room as both.
    for a, b in zip(*(torch.atleast_1d(each).split(_ROWS) for each in (actual, wanted)), strict=True):
        a, b = a.double(), b.double()
        found.append(torch.stack([torch.stack([norm(a - b, order), norm(b, order)]) for order in orders]))
    by_piece = torch.stack(found, -1)
    both = torch.stack([norm(by_piece[at], order, dim=-1) for at, order in enumerate(orders)])
    difference, size = both.unbind(-1)
    return (difference / size.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
