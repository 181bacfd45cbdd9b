"""CUDA's compiler, as `scripts/kernel_resources.py` finds and runs it."""

import runpy

import pytest

from tests.support import in_checkout

KERNEL_RESOURCES = runpy.run_path(str(in_checkout("scripts/kernel_resources.py")))
NVCC = KERNEL_RESOURCES["find_nvcc"]()

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on this machine")
