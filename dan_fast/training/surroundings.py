"""Under what a training runs: versions, on which its bits depend, and device and threads, on which its seconds do."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import PIL
import torch
import torchvision

from dan_fast import __version__, _extension
from dan_fast.core.devices import device_name
from dan_fast.core.float32 import float32_rounding

VERSIONS = ("dan_fast", "torch", "torchvision", "Pillow", "timm", "extension")


def versions() -> dict[str, str | None]:
    """The version of each of :data:`VERSIONS`; of the extension the digest of its sources; None for what is absent."""
    try:
        timm = version("timm")
    except PackageNotFoundError:
        timm = None
    # As plain strings: a checkpoint is loaded with weights_only=True.
    images = str(torchvision.__version__), PIL.__version__
    found = __version__, str(torch.__version__), *images, timm, _extension.build_info().get("source_hash")
    return dict(zip(VERSIONS, found, strict=True))


def rounding_in_words(past: Sequence[Mapping[str, Any]]) -> str:
    """How float32 products were rounded by the processes of a run, one after the other: "IEEE" where they were not.

    Example:
        >>> rounding_in_words([{"float32": "TF32 in convolutions"}, {"float32": "IEEE"}, {"float32": "IEEE"}])
        'TF32 in convolutions, then IEEE'
    """
    found = [each.get("float32", "not recorded") for each in past]
    return ", then ".join(each for each, before in zip(found, [None, *found], strict=False) if each != before)


def ran_under(device: torch.device, ranks: int, saved: Mapping[str, Any] | None, epochs: int) -> dict[str, Any]:
    """Under what the processes of a run ran, in order and as far as its checkpoint knows; this process comes last.

    Args:
        device: of this process.
        ranks: how many processes train together now.
        saved: the run's checkpoint where it goes on from one.
        epochs: of the whole training.

    Returns:
        "ranks": how many trained last, which where the training has ended are not those that evaluate it again; and
        "ran_under": for each process that differs from the one before it, `versions` and "device", its model, "threads"
        of the CPU, "float32", how its products are rounded, and "ranks".
    """
    before = [] if saved is None else saved.get("ran_under", [])
    rounding = float32_rounding(device) or "IEEE"
    here = {"device": device_name(device), "threads": torch.get_num_threads(), "float32": rounding, "ranks": ranks}
    now = {**versions(), **here}
    trained = ranks if saved is None or saved["epoch"] < epochs else saved.get("ranks", 1)
    return {"ran_under": before if before[-1:] == [now] else [*before, now], "ranks": trained}


def changes_of_surroundings(past: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the last process of a run has otherwise than the one before it, a clause each.

    Example:
        >>> list(changes_of_surroundings([{"torch": "2.11.0", "threads": 2}, {"torch": "2.12.0", "threads": 2}]))
        ['torch is 2.12.0 and was 2.11.0']
    """
    if len(past) < 2:
        return
    before, now = past[-2:]
    for name in now:
        # Older versions recorded less.
        if name in before and before[name] != now[name]:
            yield f"{name} is {now[name]} and was {before[name]}"
