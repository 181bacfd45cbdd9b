"""dan_fast: the Data Assimilation Network for generalizable person re-identification, made fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dan_fast import reference
    from dan_fast.core.types import MemoryState, NLCBAMWeights

__version__ = "0.1.0"
__all__ = ["MemoryState", "NLCBAMWeights", "__version__", "reference"]


def __getattr__(name: str) -> object:
    # With the first of them comes PyTorch, for which the list of commands and their `--version` need not wait.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = import_module("dan_fast.reference")
    if name != "reference":
        found = getattr(found, name)
        globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
