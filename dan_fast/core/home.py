"""The home folder in the place of ~ in settings."""

import os

from jsonargparse import Namespace


def with_home(parsed: Namespace) -> Namespace:
    """With the home folder in the place of the ~ that paths begin with, which a shell leaves in files and after =.

    Args:
        parsed: settings by dotted names, which is changed; of its values strings and lists of them are looked at.
    """
    for name, value in parsed.items():
        if isinstance(value, str):
            parsed[name] = _expanded(value)
        elif isinstance(value, list):
            parsed[name] = [_expanded(each) if isinstance(each, str) else each for each in value]
    return parsed


def _expanded(text: str) -> str:
    return os.path.expanduser(text) if text.startswith("~") else text
