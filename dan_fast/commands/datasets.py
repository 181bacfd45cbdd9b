"""`dan-fast datasets`: which known datasets lie where, what differs from the literature, and what is missing."""

import json as json_text
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dan_fast.core.home import expanded
from dan_fast.core.terminal import PLAIN
from dan_fast.data.datasets.known import KNOWN, FoundDataset, find_datasets


def list_datasets(
    roots: Sequence[str], json: bool = False, extract: bool = False, console: Console | None = None
) -> None:
    """Print the datasets found at folders, up to two levels below them, and those that are missing.

    Args:
        roots: Folders to look in.
        json: Print one JSON object instead of a table.
        extract: First write the images of archives that hold them otherwise, CUHK03's cuhk-03.mat and
            CUHK-SYSU's whole frames, as files beside them.
        console: Where to print to; standard output by default.

    Raises:
        DanFastError: a folder that is absent or cannot be read, or an archive that cannot be extracted.
    """
    folders = [expanded(root) for root in roots]
    found = _search(folders)
    if extract and _extract(found):
        found = _search(folders)
    missing = [known for known in KNOWN.values() if known not in [each.known for each in found]]
    console = console or Console()
    if json:
        lacking = [{key: getattr(each, key) for key in ("name", "title", "origin", "note")} for each in missing]
        content = {"found": [_as_json(each) for each in found], "missing": lacking}
        console.print_json(json_text.dumps(content))
        return
    if found:
        console.print(_table(found))
    for line in dict.fromkeys(f"{each.path}: {sentence}" for each in found for sentence in _remarks(each)):
        console.print(line, **PLAIN)
    for known in missing:
        origin = f" It can be asked for at {known.origin}." if known.origin else ""
        console.print(f"Not found: {known.title}.{origin} {known.note}".strip(), **PLAIN)


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


def _remarks(found: FoundDataset) -> list[str]:
    return [sentence for sentence in (found.error, *found.differences, found.known.note) if sentence]


def _as_json(found: FoundDataset) -> dict[str, Any]:
    return {
        "name": found.known.name,
        "title": found.known.title,
        "variant": found.variant,
        "path": str(found.path),
        "splits": {split: counts._asdict() for split, counts in found.counts.items()},
        "differences": list(found.differences),
        "error": found.error,
        "note": found.known.note,
    }
