"""Whether an iteration follows the same gradients with the package's operators as with the paper's literal ones.

Rounding alone can change these gradients much: S moves the weights by what it gives, weights that differ in a last bit
turn a ReLU on or off in the pass of S~, and batch norm over few images makes more of it. So the passes that are
compared see S~ at the same weights, and what rounding does to the rest is measured beside them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dan_fast.bench.iteration_contenders import DANIteration, literal_operators

# Of the norm of a group's gradient; half precision rounds in every layer.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Or so many times what rounding alone does, where that is more.
_ROUNDINGS = 4


class Agreement(NamedTuple):
    """Attributes:
    disagrees: what differs by more than is allowed, None if nothing does.
    errors: distance of the gradients as a share of their norm, by group of parameters.
    rounding: the same between literal gradients with and without the last bit of the last feature map changed.
    allowed: how large an error may be.
    """

    disagrees: str | None
    errors: dict[str, float]
    rounding: dict[str, float]
    allowed: dict[str, float]


def compare_iteration(dan: DANIteration, limit: float) -> Agreement:
    """The gradients of the kind of iteration that `dan` is set to; its memories stay as they are."""
    with literal_operators(dan.trainer):
        expected, moved = dan.gradients()
    # The operators begin at the last feature map: that is where their rounding differs, in either precision.
    with literal_operators(dan.trainer, torch.Generator().manual_seed(0)):
        rounded, _ = dan.gradients(moved)
    found, _ = dan.gradients(moved)
    if found.keys() != expected.keys():
        return Agreement("the parameters that have a gradient", {}, {}, {})
    errors, rounding = group_errors(found, expected), group_errors(rounded, expected)
    allowed = {group: max(limit, _ROUNDINGS * floor) for group, floor in rounding.items()}
    return Agreement(differences(errors, allowed), errors, rounding, allowed)


def group_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The distance of the gradients of each group of parameters as a share of the norm of what is expected."""
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault("memory" if name.startswith("memory.") else name.split(".")[1], []).append(name)
    errors = {}
    for group, names in groups.items():
        wanted, actual = (torch.cat([grads[name].double().flatten() for name in names]) for grads in (expected, found))
        tiny = torch.finfo(torch.float32).tiny
        errors[group] = float((actual - wanted).norm() / wanted.norm().clamp(min=tiny))
    return errors


def differences(errors: dict[str, float], allowed: dict[str, float]) -> str | None:
    """The groups whose error is larger than allowed, in words; None if there are none."""
    # `not <=` so that NaN is wrong.
    wrong = [f"gradient of {g} by {e:.1e} (allowed {allowed[g]:.1e})" for g, e in errors.items() if not e <= allowed[g]]
    return "; ".join(wrong) or None
