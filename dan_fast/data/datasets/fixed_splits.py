"""The ten splits into train, query and gallery of the small test sets, shipped as lists with a hash."""

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from importlib import resources
from typing import Any

from dan_fast.core.errors import DanFastError
from dan_fast.data.samples import FixedSplit, FixedSplits, Sample

# SHA-256 of splits/*.json, which scripts/make_splits.py draws.
DIGESTS = {
    "viper": "16aed717f45b56a1744190e26b13904af34939a6c97b6fb4e4a309fbea9bb8be",
    "prid": "92e4031b04509aae1693099a12667592abfb6bd6a38bab484c97f8fb0e6d79b7",
    "grid": "e944e6a4d29c6db1a780fc8a34be7286572667f57a6da6481dca3769ca16e8dc",
    "ilids": "4d0cbf000e3a9a7713b8878b4cd21768f66688ca0e5a2db19306e37ab716e6d0",
}


def read_lists(name: str) -> tuple[str, list[dict[str, list[Any]]]]:
    """The hash (hex) of a shipped list, and what each of its ten splits names.

    Raises:
        DanFastError: the file is not there or not the one that was shipped.

    Example:
        >>> digest, lists = read_lists("prid")
        >>> digest == DIGESTS["prid"], len(lists), len(lists[0]["train"]), len(lists[0]["test"])
        (True, 10, 100, 100)
    """
    file = resources.files("dan_fast.data.datasets") / "splits" / f"{name}.json"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DanFastError(f"The list of splits {file} cannot be read ({error.strerror}); install again.") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != DIGESTS[name]:
        raise DanFastError(
            f"The list of splits {file} was changed: its SHA-256 begins with {digest[:8]} instead of "
            f"{DIGESTS[name][:8]}, so results could not be compared with others; install again."
        )
    return digest, json.loads(content)["splits"]


def fixed_splits(
    name: str,
    samples: Mapping[Hashable, Sample],
    keys: Callable[[dict[str, list[Any]]], tuple[Iterable[Hashable], Iterable[Hashable], Iterable[Hashable]]],
) -> FixedSplits:
    """The shipped splits, made of the images of a folder.

    Args:
        name: of the list, a key of :data:`DIGESTS`.
        samples: the images of the folder by their keys, which are such that a message can show them.
        keys: from what the list names in a split to the keys of its train, query and gallery images.

    Raises:
        DanFastError: as `read_lists`. Missing images are no error here: such a folder can still be trained on.
    """
    digest, lists = read_lists(name)
    wanted = [tuple(tuple(part) for part in keys(each)) for each in lists]
    missing = sorted({key for split in wanted for part in split for key in part} - samples.keys())
    if missing:
        images = "an image" if len(missing) == 1 else f"{len(missing)} images"
        return FixedSplits(name, digest, (), f"{images} that the splits name, {missing[0]} the first")
    splits = tuple(FixedSplit(*(tuple(samples[key] for key in part) for part in split)) for split in wanted)
    return FixedSplits(name, digest, splits)
