"""`dan-fast protocols`: the named protocols, and which of them the datasets in a folder suffice for."""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dan_fast.data.protocols import PROTOCOLS, Part, Protocol, Shelf


def list_protocols(root: str | None = None, json: bool = False, console: Console | None = None) -> None:
    """Print the named protocols: what they train on and test on, and what of it is missing in a folder.

    Args:
        root: Folder to look for the datasets in, two levels deep; by default none is looked for.
        json: Print one JSON object instead of a table.
        console: Where to print to; standard output by default.

    Raises:
        DanFastError: a folder that is absent or cannot be read.
    """
    console = console or Console()
    shelf = None if root is None else Shelf(root)
    missing = {each.name: [] if shelf is None else shelf.missing(each) for each in PROTOCOLS.values()}
    if json:
        content = [_as_json(each) | ({} if shelf is None else {"missing": missing[each.name]}) for each in _all()]
        console.print_json(json_text.dumps(content))
        return
    table = Table(show_lines=True)
    for column in ("name", "trained on", "images", "unlabelled", "tested on", *(["complete?"] if shelf else [])):
        table.add_column(column, overflow="fold")
    for each in _all():
        verdict = [] if shelf is None else [f"no, {len(missing[each.name])} missing" if missing[each.name] else "yes"]
        cells = (_titles(each.labeled), each.images, _titles(each.unlabeled), _titles(each.targets))
        table.add_row(each.name, *map(Text, cells), *verdict)
    console.print(table)
    for each in _all():
        console.print(f"{each.name}: {each.title}. {each.source}.", soft_wrap=True, highlight=False, markup=False)
    for clause in dict.fromkeys(clause for clauses in missing.values() for clause in clauses):
        console.print(f"Missing: {clause}.", soft_wrap=True, highlight=False, markup=False)


def _all() -> Sequence[Protocol]:
    return tuple(PROTOCOLS.values())


def _titles(parts: Sequence[Part]) -> str:
    return "\n".join(part.title for part in parts) or "–"


def _as_json(protocol: Protocol) -> dict[str, Any]:
    def plain(parts: Sequence[Part]) -> list[dict[str, Any]]:
        return [{"dataset": part.dataset, "variants": list(part.variants)} for part in parts]

    return {
        "name": protocol.name,
        "title": protocol.title,
        "labeled": plain(protocol.labeled),
        "unlabeled": plain(protocol.unlabeled),
        "targets": plain(protocol.targets),
        "images": protocol.images,
        "source": protocol.source,
    }
