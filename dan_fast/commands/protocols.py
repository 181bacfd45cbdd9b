"""`dan-fast protocols`: the named protocols, and which of them the datasets in a folder suffice for."""

import json as json_text
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dan_fast.core.terminal import PLAIN
from dan_fast.data.named_protocols import PROTOCOLS, Part, Protocol, Shelf


def list_protocols(root: str | None = None, json: bool = False) -> None:
    """Print the named protocols: what they train and test on, and which of these datasets a folder lacks.

    Args:
        root: Folder in which to look for the datasets, two levels deep; by default no dataset is looked for.
        json: Print one JSON object instead of a table.

    Raises:
        DanFastError: a folder that is absent or cannot be read.
    """
    console = Console()
    shelf = None if root is None else Shelf(root)
    missing = {name: {} if shelf is None else shelf.missing(each) for name, each in PROTOCOLS.items()}
    if json:
        content = [
            _as_json(each) | ({} if shelf is None else {"missing": list(missing[name].values())})
            for name, each in PROTOCOLS.items()
        ]
        console.print_json(json_text.dumps(content))
        return
    for name, each in PROTOCOLS.items():
        images = {"all": "all images", "train": "the train splits"}[each.images]
        lines = [
            f"{name}: {each.title}. {each.source}.",
            f"    trained on {images} of {_titles(each.labeled)}",
            *([f"    unlabelled {images} of {_titles(each.unlabeled)}"] if each.unlabeled else []),
            f"    tested on  {_titles(each.targets)}",
        ]
        if shelf is not None:
            lines.append(f"    missing    {_titles(tuple(missing[name])) or 'nothing'}")
        console.print("\n".join(lines), **PLAIN)
    for clause in dict.fromkeys(clause for clauses in missing.values() for clause in clauses.values()):
        console.print(f"Missing: {clause}.", **PLAIN)


def _titles(parts: Sequence[Part]) -> str:
    return ", ".join(part.title for part in parts)


def _as_json(protocol: Protocol) -> dict[str, Any]:
    return {
        name: [part._asdict() for part in value] if isinstance(value, tuple) else value
        for name, value in vars(protocol).items()
    }
