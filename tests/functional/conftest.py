"""Every function has two forms; most tests hold for both."""

import pytest

from dan_fast import functional, reference


@pytest.fixture(params=[reference, functional], ids=["reference", "functional"])
def impl(request):
    return request.param
