"""The home folder in the place of the ~ that a path begins with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import Namespace


def expanded(path: str | Path) -> Path:
    """The path with the home folder in the place of the ~ that it begins with; with that of no user it stays.

    Example:
        >>> expanded("~/b.jpg") == Path.home() / "b.jpg", str(expanded("~nobody-of-this-name/b.jpg"))
        (True, '~nobody-of-this-name/b.jpg')
    """
    return Path(os.path.expanduser(path))


def with_home(parsed: Namespace) -> Namespace:
    """Settings with the home folder in the place of ~, which a shell leaves in files and after =.

    Args:
        parsed: settings by dotted names, which is changed; of its values strings and lists of them are looked at.
    """
    for name, value in parsed.items():
        if isinstance(value, str):
            parsed[name] = os.path.expanduser(value)
        elif isinstance(value, list):
            parsed[name] = [os.path.expanduser(each) if isinstance(each, str) else each for each in value]
    return parsed
