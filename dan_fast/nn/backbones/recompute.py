"""Gradient checkpointing that knows which weights a pass was made with."""

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def with_weights_kept(module: Module, run: Callable[[Module], Tensor]) -> Tensor:
    """`run(module)`, where what `torch.utils.checkpoint` computes again sees the module as it is now.

    A checkpointed segment runs again in the backward pass. By then the meta step, which evaluates other weights in
    place of the module's as `torch.func.functional_call` does, has put the module's own weights back, and the segment
    would silently be computed with them. And batch norm would count the same batch twice. So the segments are those of
    a copy: modules that hold the very tensors the module's hold now, parameters and buffers, until the pass is over;
    from then on its buffers are others, and what is computed again updates those. Batch norm that left its statistics
    alone has none from then on: it has to normalise by the batch when it is computed again, whatever is set by then.

    Args:
        module: what is run; its modules are copied, its tensors are not.
        run: from such a copy to the result; it calls `torch.utils.checkpoint.checkpoint` with `use_reentrant=False`.
    """
    twin = _copied(module, {})
    result = run(twin)
    for part in twin.modules():
        by_batch = part.training and getattr(part, "track_running_stats", True) is False
        part._buffers = {
            name: None if value is None or by_batch else value.clone() for name, value in part._buffers.items()
        }
    return result


def _copied(module: Module, known: dict[nn.Module, nn.Module]) -> Module:
    if module not in known:
        twin = known[module] = copy.copy(module)
        # A shallow copy shares the dictionaries, which the meta step writes to.
        twin._parameters, twin._buffers = dict(module._parameters), dict(module._buffers)
        twin._modules = {
            name: None if child is None else _copied(child, known) for name, child in module._modules.items()
        }
    return known[module]
