"""The warnings of what a test runs."""

import warnings
from collections.abc import Iterable


def own_warnings(caught: Iterable[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """Without those of files that other tests have left open, and that garbage collection closes at this moment."""
    return [each for each in caught if each.category is not ResourceWarning]
