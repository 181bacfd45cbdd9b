"""Packages that not every installation has."""

from importlib import import_module
from types import ModuleType

from dan_fast.core.errors import DanFastError


def optional(module: str, sentence: str) -> ModuleType:
    """A module of such a package.

    Raises:
        DanFastError: it is not installed, in the words of `sentence`.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DanFastError(sentence) from error
