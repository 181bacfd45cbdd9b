"""Whether an iteration follows the same gradients with the package's operators as with the paper's literal ones.

Rounding alone can change these gradients much: S moves the weights by what it gives, weights that differ in a last bit
turn a ReLU on or off in the pass of S~, and batch norm over few images makes more of it. So the passes that are
compared see S~ at the same weights, and what rounding does to the rest is measured beside them.
"""

import torch
from torch import Tensor

from dan_fast.bench.agreement import Agreement, judge, relative_error
from dan_fast.bench.iteration.contenders import DANIteration, literal_operators

# Of the norm of a group's gradient; half precision rounds in every layer.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2}
# Or so many times what rounding alone does, where that is more.
_ROUNDINGS = 4


Errors = dict[str, float]


def compare_iteration(dan: DANIteration, limit: float) -> tuple[Agreement, Errors, Errors]:
    """The gradients of the kind of iteration that `dan` is set to; its memories stay as they are.

    Returns:
        Whether they agree; the errors between literal gradients with and without the last bit of the last feature map
        changed; and how large an error may be.
    """
    with literal_operators(dan.model):
        expected, moved = dan.gradients()
    # The operators begin at the last feature map: that is where their rounding differs, in either precision.
    with literal_operators(dan.model, torch.Generator().manual_seed(0)):
        rounded, _ = dan.gradients(moved)
    found, _ = dan.gradients(moved)
    if found.keys() != expected.keys():
        return Agreement("the parameters that have a gradient", {}), {}, {}
    rounding = group_errors(rounded, expected)
    allowed = {group: max(limit, _ROUNDINGS * floor) for group, floor in rounding.items()}
    errors = group_errors(found, expected)
    named = [{f"gradient of {group}": value for group, value in each.items()} for each in (errors, allowed)]
    return Agreement(judge(*named).disagrees, errors), rounding, allowed


def group_errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Errors:
    """The distance of the gradients of each group of parameters as a share of the norm of what is expected."""
    groups: dict[str, list[str]] = {}
    for name in found:
        groups.setdefault("memory" if name.startswith("memory.") else name.split(".")[1], []).append(name)
    return {
        group: relative_error(*(torch.cat([grads[name].flatten() for name in names]) for grads in (found, expected)), 2)
        for group, names in groups.items()
    }
