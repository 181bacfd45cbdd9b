"""dan_fast: the Data Assimilation Network for generalizable person re-identification, made fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dan_fast import reference
    from dan_fast.core.errors import DanFastError, Interrupted
    from dan_fast.core.types import MemoryState, NLCBAMWeights
    from dan_fast.inference import FeatureExtractor

__version__ = "0.1.0"
__all__ = [
    "DanFastError",
    "FeatureExtractor",
    "Interrupted",
    "MemoryState",
    "NLCBAMWeights",
    "__version__",
    "reference",
]

# Imported when a name is first used: all but `core.errors` import PyTorch, which takes more than a second.
_MODULES = {
    "DanFastError": "dan_fast.core.errors",
    "FeatureExtractor": "dan_fast.inference",
    "Interrupted": "dan_fast.core.errors",
    "MemoryState": "dan_fast.reference",
    "NLCBAMWeights": "dan_fast.reference",
}


def __getattr__(name: str) -> object:
    if name == "reference":
        return import_module("dan_fast.reference")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
