"""How many random examples a test draws.

By default each test runs a fixed set of them. To search further, as in

    DAN_FAST_EXAMPLES=2000 python -m pytest tests/functional/memory/test_sequences.py

set how many examples each test draws; they then differ from run to run.
"""

import os

from hypothesis import HealthCheck, Phase, settings

_MORE = os.environ.get("DAN_FAST_EXAMPLES")


def examples(count: int) -> settings:
    """So many, by no clock: neither an example nor drawing it may be too slow for a busy machine."""
    return settings(
        max_examples=int(_MORE or count),
        derandomize=_MORE is None,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
