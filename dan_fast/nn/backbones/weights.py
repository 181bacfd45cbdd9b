"""Files of pretrained weights: read without running code, and loaded only where all of them fit."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded

_NAMED_KEYS = 5


def read_state_dict(path: Path, owner: str) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`, or of safetensors where its name ends in .safetensors.

    Args:
        path: the file.
        owner: whose state dict is wanted, in words, for the messages.

    Raises:
        DanFastError: no such file, a damaged one, or one without a state dict.
    """
    path = expanded(path)
    if not path.is_file():
        raise DanFastError(f"there is no weights file {path}; give its path, or 'none' or 'imagenet' as weights")
    is_safe = path.suffix == ".safetensors"
    try:
        state = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    # Damaged bytes can make the unpickler raise almost anything.
    except Exception as error:
        if isinstance(error, UnpicklingError) and "Unsupported global" in str(error):
            raise DanFastError(
                f"the weights file {path} holds other objects than tensors, which are not read: load it where you "
                f"trust it, by torch.load(..., weights_only=False), and save the state dict of {owner} alone"
            ) from error
        kind = "safetensors file" if is_safe else "file of torch.save"
        raise DanFastError(
            f"the weights file {path} is damaged or no {kind} ({type(error).__name__}); "
            f"download it again or save the state dict of {owner} in it"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        held = ", ".join(map(str, [*state][:_NAMED_KEYS])) if isinstance(state, Mapping) else type(state).__name__
        raise DanFastError(f"the weights file {path} holds no state dict but {held}; save that of {owner} in it")
    return dict(state)


def load_fitting(
    module: nn.Module,
    state: Mapping[str, Tensor],
    name: str,
    weights: str | PathLike[str],
    belongs_to_head: Callable[[str], bool],
) -> None:
    """Load a state dict that has all tensors of a module and no others but those of the head, which is left out.

    Raises:
        DanFastError: tensors that are missing, unexpected, of another shape or not finite; it names them.
    """
    wanted = module.state_dict()
    state = {key: value for key, value in state.items() if key in wanted or not belongs_to_head(key)}
    # Files older than batch norm's counters lack them; they start at 0.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped, "not finite": broken}
    found = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
    if found:
        remedy = f"give a file of a {name}"
        if prefix := _prefix(missing, unexpected):
            remedy = f"take {prefix!r} off its names"
        elif not missing + reshaped + broken:
            remedy = "leave these out of it"
        raise DanFastError(f"the weights {weights} do not fit {name} ({found}); {remedy}")
    module.load_state_dict(state, strict=False)


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """What stands before all names of a file, as `module.` of DataParallel; "" for nothing."""
    ends = (key.removesuffix(missing[0]) for key in unexpected if missing and key.endswith(f".{missing[0]}"))
    return next((prefix for prefix in ends if {prefix + key for key in missing} <= {*unexpected}), "")


def _some(keys: list[str]) -> str:
    more = len(keys) - _NAMED_KEYS
    return ", ".join(keys[:_NAMED_KEYS]) + (f" and {more} more" if more > 0 else "")
