"""Do two contenders say the same? Without that a ratio of their times means nothing."""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.bench.contenders import GRADIENTS, Outcome
from dan_fast.core.types import MemoryState

_ROWS = 4096


class Tolerance(NamedTuple):
    """How far a contender may be from the one it is compared with, as a share of the largest number in the tensor.

    Attributes:
        loss: of the loss.
        statistics: of usage and evaluation. Every slot gets about 1/s of a key, so this has to be far below 1/s.
        features: of the features.
        gradients: of the gradients.
        changed: the share of the features that may differ at all; half precision rounds away most of an error, so
            that the largest difference alone would not show a missing write.
    """

    loss: float
    statistics: float
    features: float
    gradients: float
    changed: float


TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12, 1e-12, 1e-10, 1.0),
    # The literal form's own gradients of unlabelled keys are 2e-5 from float64 at a quarter of the paper's slots, ten
    # times as far as score space's, and further with more slots.
    torch.float32: Tolerance(1e-5, 5e-6, 2e-6, 1e-3, 1.0),
    # Features and the keys' gradients are rounded to 8 and 11 bits at the end; everything else is float32.
    torch.bfloat16: Tolerance(1e-5, 5e-6, 2**-7, 2**-6, 0.02),
    torch.float16: Tolerance(1e-5, 5e-6, 2**-10, 2**-9, 0.02),
}


class Agreement(NamedTuple):
    """Attributes:
    disagrees: what differs beyond its tolerance and by how much, None if nothing does.
    errors: the largest difference of each tensor as a share of its largest number.
    """

    disagrees: str | None
    errors: dict[str, float]


def compare(outcome: Outcome, expected: Outcome, dtype: torch.dtype) -> Agreement:
    """Loss, pseudo labels, gradients (where both have them) and both new states.

    Args:
        outcome: of the contender.
        expected: of the one it is measured by, from the same state with the same batch.
        dtype: of the memories; it decides the tolerances.

    Example:
        >>> from dan_fast.bench.contenders import select
        >>> from dan_fast.bench.problem import Size, make_problem
        >>> problem = make_problem(Size(24, 12, key_dim=8, batch=2), torch.float64, "cpu")
        >>> literal, score_space, *_ = (c.start(problem, 1).outcome() for c in select()[:3])
        >>> compare(score_space, literal, problem.dtype).disagrees is None
        True
    """
    tolerance, errors, wrong = TOLERANCES[dtype], {}, []

    def close(name: str, actual: Tensor, wanted: Tensor, limit: float) -> None:
        errors[name] = _relative_error(actual, wanted)
        # `not <=` so that NaN is wrong.
        if not errors[name] <= limit:
            wrong.append(f"{name} by {errors[name]:.1e} (allowed {limit:.0e})")

    def same(name: str, actual: Tensor, wanted: Tensor) -> None:
        if actual.shape != wanted.shape:
            wrong.append(f"shape of {name}")
        elif differing := int((actual != wanted).sum()):
            wrong.append(f"{name} in {differing} of {actual.numel()} places")

    close("loss", outcome.loss, expected.loss, tolerance.loss)
    same("pseudo_labels", outcome.pseudo_labels, expected.pseudo_labels)
    for memory in ("labeled", "unlabeled"):
        actual: MemoryState = getattr(outcome, memory)
        wanted: MemoryState = getattr(expected, memory)
        for field in ("labels", "sample_ids", "least_used"):
            same(f"{memory}.{field}", getattr(actual, field), getattr(wanted, field))
        for field in ("usage", "evaluation"):
            close(f"{memory}.{field}", getattr(actual, field), getattr(wanted, field), tolerance.statistics)
        close(f"{memory}.features", actual.features, wanted.features, tolerance.features)
        if tolerance.changed < 1 and actual.features.shape == wanted.features.shape:
            changed = _share_changed(actual.features, wanted.features)
            if changed > tolerance.changed:
                wrong.append(f"{memory}.features in {changed:.1%} of the numbers (allowed {tolerance.changed:.0%})")
    if outcome.gradients is not None and expected.gradients is not None:
        for name, actual, wanted in zip(GRADIENTS, outcome.gradients, expected.gradients, strict=True):
            close(f"gradient of {name}", actual, wanted, tolerance.gradients)
    return Agreement("; ".join(wrong) or None, errors)


def _relative_error(actual: Tensor, wanted: Tensor) -> float:
    if actual.shape != wanted.shape:
        return float("nan")
    if wanted.numel() == 0:
        return 0.0
    # In pieces: a difference of whole memories would need as much room as both.
    pieces = zip(torch.atleast_1d(actual).split(_ROWS), torch.atleast_1d(wanted).split(_ROWS), strict=True)
    found = [torch.stack([(a.double() - b.double()).abs().max(), b.double().abs().max()]) for a, b in pieces]
    difference, largest = torch.stack(found).amax(0).tolist()
    return difference / max(largest, torch.finfo(torch.float32).tiny)


def _share_changed(actual: Tensor, wanted: Tensor) -> float:
    pieces = zip(actual.split(_ROWS), wanted.split(_ROWS), strict=True)
    return sum(int((a != b).sum()) for a, b in pieces) / wanted.numel()
