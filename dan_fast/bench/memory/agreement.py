"""Whether two memory steps are the same: losses, labels, gradients and both new states."""

import math
from typing import NamedTuple

import torch

from dan_fast.bench.agreement import Agreement, Pair, compare_pairs
from dan_fast.bench.memory.contenders import GRADIENTS, Outcome
from dan_fast.core.types import MemoryState


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
    """Loss, pseudo labels, gradients (where both have them) and both new states, from the same state and batch.

    Args:
        outcome: of the contender.
        expected: of the one it is measured by.
        dtype: of the memories; it decides the tolerances.

    Example:
        >>> from dan_fast.bench.memory.contenders import select
        >>> from dan_fast.bench.memory.problem import Size, make_problem
        >>> problem = make_problem(Size(24, 12, key_dim=8, batch=2), torch.float64, "cpu")
        >>> literal, score_space, *_ = (c.start(problem, 1).outcome() for c in select()[:3])
        >>> compare(score_space, literal, problem.dtype).disagrees is None
        True
    """
    tolerance, different = TOLERANCES[dtype], []
    pairs = [Pair("loss", outcome.loss, expected.loss, tolerance.loss)]
    pairs.append(Pair("pseudo_labels", outcome.pseudo_labels, expected.pseudo_labels))
    limits = {"usage": tolerance.statistics, "evaluation": tolerance.statistics, "features": tolerance.features}
    for memory in ("labeled", "unlabeled"):
        states = zip(MemoryState._fields, getattr(outcome, memory), getattr(expected, memory), strict=True)
        pairs += [Pair(f"{memory}.{field}", *both, limits.get(field)) for field, *both in states]
        actual, wanted = (getattr(each, memory).features for each in (outcome, expected))
        if tolerance.changed < 1 and actual.shape == wanted.shape:
            changed = int((actual != wanted).sum()) / wanted.numel()
            if changed > tolerance.changed:
                different.append(f"{memory}.features in {changed:.1%} of the numbers (allowed {tolerance.changed:.0%})")
    if outcome.gradients is not None and expected.gradients is not None:
        for name, *both in zip(GRADIENTS, outcome.gradients, expected.gradients, strict=True):
            pairs.append(Pair(f"gradient of {name}", *both, tolerance.gradients))
    return compare_pairs(pairs, math.inf, different=different)
