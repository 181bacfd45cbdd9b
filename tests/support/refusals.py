"""What a call says that refuses its arguments."""

from collections.abc import Callable
from typing import Any

import pytest

from dan_fast.core.errors import DanFastError


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The sentence of the DanFastError that a call raises, which is one."""
    with pytest.raises(DanFastError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    del caught  # whose traceback holds this frame: what the call made would last until garbage is collected
    assert "\n" not in message and message.endswith(".")
    return message
