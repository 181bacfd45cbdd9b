"""dan_fast: the Data Assimilation Network for generalizable person re-identification, made fast."""

from dan_fast.reference.types import MemoryState, NLCBAMWeights

__version__ = "0.1.0"
__all__ = ["MemoryState", "NLCBAMWeights", "__version__"]
