"""`dan-fast datasets`: which datasets lie where, what differs from the literature, and what of it is missing."""

import json as json_text
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dan_fast.core.errors import DanFastError
from dan_fast.core.home import expanded
from dan_fast.core.terminal import PLAIN
from dan_fast.data.datasets.known import KNOWN, FoundDataset, counts_of, find_datasets
from dan_fast.data.datasets.load import MANIFEST, is_manifest, load_dataset
from dan_fast.data.datasets.market1501 import is_named_market1501
from dan_fast.data.samples import Counts


def list_datasets(roots: Sequence[str], json: bool = False, extract: bool = False) -> None:
    """Print the datasets found at folders, up to two levels below them, and the known ones that are missing.

    Args:
        roots: Folders to look in, or manifests.
        json: Print one JSON object instead of a table.
        extract: First write the images that archives hold in another form, CUHK03's cuhk-03.mat and CUHK-SYSU's whole
            frames, as files beside them.

    Raises:
        DanFastError: a folder that is absent or cannot be read, or an archive that cannot be extracted.
    """
    places = [expanded(root) for root in roots]
    folders = [place for place in places if not is_manifest(place)]
    found = _search(folders)
    if extract and _extract(found):
        found = _search(folders)
    # Of a manifest alone nothing is asked but what it holds.
    missing = [each for each in KNOWN.values() if folders and each not in [one.known for one in found]]
    known = {each.path.resolve() for each in found}
    of_places = (each for place in places for each in ([place] if is_manifest(place) else _own(place, known)))
    own = {_file_of(each): each for each in of_places}.values()
    console = Console()
    if json:
        lacking = [{key: getattr(each, key) for key in ("name", "title", "origin", "note")} for each in missing]
        of_ones_own = [{"path": str(place), **_contents(place)[1]} for place in own]
        content = {"found": [_as_json(each) for each in found], "own": of_ones_own, "missing": lacking}
        console.print_json(json_text.dumps(content))
        return
    if found:
        console.print(_table(found))
    remarks = ((each.path, each.error, *each.differences, each.known.note) for each in found)
    for line in dict.fromkeys(f"{path}: {remark}" for path, *said in remarks for remark in said if remark):
        console.print(line, **PLAIN)
    for place in own:
        console.print(f"{place}: {_contents(place)[0]}", **PLAIN)
    for each in missing:
        origin = f" It can be asked for at {each.origin}." if each.origin else ""
        console.print(f"Not found: {each.title}.{origin} {each.note}".strip(), **PLAIN)


def _extract(found: Sequence[FoundDataset]) -> list[Path]:
    written = []
    for name, folder in dict.fromkeys((each.known.name, each.path) for each in found):
        extract = KNOWN[name].extract
        if extract is not None:
            # To the error output: the listing may be JSON.
            print(f"{folder}: extracting the images that are not there as files.", file=sys.stderr)
            written += extract(folder)
    return written


def _search(folders: Sequence[Path]) -> list[FoundDataset]:
    found: dict[tuple[str, Path, str], FoundDataset] = {}
    for folder in folders:
        for each in find_datasets(folder):
            found.setdefault((each.known.name, each.path.resolve(), each.variant), each)
    return list(found.values())


def _own(folder: Path, known: Collection[Path], depth: int = 2) -> Iterator[Path]:
    """Folders with a manifest or in the Market-1501 layout that are none of the `known` places."""
    if any(folder.resolve().is_relative_to(place) for place in known):
        return
    if (folder / MANIFEST).is_file() or is_named_market1501(folder):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and os.access(child, os.R_OK | os.X_OK):
                yield from _own(child, known, depth - 1)


def _file_of(place: Path) -> Path:
    """By what a dataset of one's own is told from others, whatever path leads to it."""
    return (place / MANIFEST if (place / MANIFEST).is_file() else place).resolve()


def _contents(place: Path) -> tuple[str, dict[str, Any]]:
    """What a dataset of one's own holds, or why it cannot be read, as a sentence and for JSON."""
    try:
        dataset = load_dataset(place)
    except DanFastError as error:
        return str(error), {"name": "", "splits": {}, "error": str(error)}
    return f"{dataset.contents}.", {"name": dataset.name, "splits": _counts(counts_of(dataset)), "error": ""}


def _counts(counts: Mapping[str, Counts]) -> dict[str, dict[str, int | None]]:
    return {split: each._asdict() for split, each in counts.items()}


def _table(found: Sequence[FoundDataset]) -> Table:
    table = Table(show_lines=True)
    for column in ("dataset", "folder", "split"):
        table.add_column(column, overflow="fold")
    for column in ("identities", "cameras", "images"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("as published?", overflow="fold")
    for each in found:
        columns = zip(*(counts for counts in each.counts.values()), strict=True) if each.counts else ("", "", "")
        numbers = ["\n".join(f"{number:,}" for number in column) for column in columns]
        verdict = "unreadable" if each.error else "no" if each.differences else "yes"
        name = Text("\n".join(filter(None, (each.known.title, each.variant))))
        table.add_row(name, Text(str(each.path)), "\n".join(each.counts), *numbers, verdict)
    return table


def _as_json(found: FoundDataset) -> dict[str, Any]:
    return {
        "name": found.known.name,
        "title": found.known.title,
        "variant": found.variant,
        "path": str(found.path),
        "splits": _counts(found.counts),
        "differences": list(found.differences),
        "error": found.error,
        "note": found.known.note,
    }
