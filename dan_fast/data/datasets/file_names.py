"""Images whose file names contain the identity."""

import re
from collections.abc import Iterable
from pathlib import Path

from dan_fast.core.errors import DanFastError
from dan_fast.data.datasets.finding import image_files
from dan_fast.data.samples import Sample


def named_images(folder: Path, pattern: re.Pattern[str], example: str) -> list[tuple[Path, re.Match[str]]]:
    """The images of a folder with what the pattern finds at the start of their names, sorted by name.

    Args:
        folder: may hold other files too.
        pattern: what the names begin with.
        example: a name that fits, for the message.

    Raises:
        DanFastError: an image that is named otherwise.

    Example:
        >>> import tempfile
        >>> image = Path(tempfile.mkdtemp(), "017_45.bmp")
        >>> image.touch()
        >>> [(path.name, match[1]) for path, match in named_images(image.parent, re.compile(r"(\\d+)_"), "000_45.bmp")]
        [('017_45.bmp', '017')]
    """
    found = []
    for path in image_files(folder):
        match = pattern.match(path.name)
        if match is None:
            raise DanFastError(f"{path} is not named like the images beside it ({example}); rename or remove it.")
        found.append((path, match))
    return found


def are_named(folder: Path, pattern: re.Pattern[str]) -> bool:
    """Whether there is a folder with images of which most match the pattern: one stray file decides nothing."""
    names = [path.name for path in image_files(folder)]
    return 2 * sum(pattern.match(name) is not None for name in names) > len(names)


def by_key(samples: Iterable[tuple[str, Sample]]) -> dict[str, Sample]:
    """The images by their keys, one for each; two of one key are a DanFastError."""
    found: dict[str, Sample] = {}
    for key, sample in samples:
        if key in found:
            raise DanFastError(
                f"{found[key].path} and {sample.path} show the same person and there can be one image only; remove one."
            )
        found[key] = sample
    return found
