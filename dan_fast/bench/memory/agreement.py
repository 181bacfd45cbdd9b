"""Whether two memory steps are the same: losses, labels, gradients and both new states."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.bench.agreement import Agreement, judge, relative_error
from dan_fast.bench.memory.contenders import GRADIENTS, Outcome


class Tolerance(NamedTuple):
    """How far a contender may be from the one it is compared with, as a share of the largest number in the tensor.

    Every slot gets about 1/s of a key, so `statistics`, of usage and evaluation, has to be far below 1/s. `changed` is
    the share of the features that may differ at all: half precision rounds away most of an error, so that the largest
    difference alone would not show a missing write.
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


def compare(outcome: Outcome, expected: Outcome, dtype: torch.dtype) -> Agreement:
    """Loss, pseudo labels, gradients (where both have them) and both new states.

    Args:
        outcome: of the contender.
        expected: of the one it is measured by, from the same state with the same batch.
        dtype: of the memories; it decides the tolerances.

    Example:
        >>> from dan_fast.bench.memory.contenders import select
        >>> from dan_fast.bench.memory.problem import Size, make_problem
        >>> problem = make_problem(Size(24, 12, key_dim=8, batch=2), torch.float64, "cpu")
        >>> literal, score_space, *_ = (c.start(problem, 1).outcome() for c in select()[:3])
        >>> compare(score_space, literal, problem.dtype).disagrees is None
        True
    """
    tolerance, errors, allowed, different = TOLERANCES[dtype], {}, {}, []

    def close(name: str, actual: Tensor, wanted: Tensor, limit: float) -> None:
        errors[name], allowed[name] = relative_error(actual, wanted, math.inf), limit

    def same(name: str, actual: Tensor, wanted: Tensor) -> None:
        if actual.shape != wanted.shape:
            different.append(f"shape of {name}")
        elif count := int((actual != wanted).sum()):
            different.append(f"{name} in {count} of {actual.numel()} places")

    close("loss", outcome.loss, expected.loss, tolerance.loss)
    same("pseudo_labels", outcome.pseudo_labels, expected.pseudo_labels)
    for memory in ("labeled", "unlabeled"):
        actual, wanted = getattr(outcome, memory), getattr(expected, memory)
        for field in ("labels", "sample_ids", "least_used"):
            same(f"{memory}.{field}", getattr(actual, field), getattr(wanted, field))
        for field in ("usage", "evaluation"):
            close(f"{memory}.{field}", getattr(actual, field), getattr(wanted, field), tolerance.statistics)
        close(f"{memory}.features", actual.features, wanted.features, tolerance.features)
        if tolerance.changed < 1 and actual.features.shape == wanted.features.shape:
            changed = int((actual.features != wanted.features).sum()) / wanted.features.numel()
            if changed > tolerance.changed:
                different.append(f"{memory}.features in {changed:.1%} of the numbers (allowed {tolerance.changed:.0%})")
    if outcome.gradients is not None and expected.gradients is not None:
        for name, actual, wanted in zip(GRADIENTS, outcome.gradients, expected.gradients, strict=True):
            close(f"gradient of {name}", actual, wanted, tolerance.gradients)
    return judge(errors, allowed, different)
