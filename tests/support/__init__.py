"""What tests share: problems, tiny trainings, small datasets."""

from pathlib import Path

import pytest

import dan_fast

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(dan_fast.__file__).resolve().parent


def in_checkout(name: str) -> Path:
    """A file of the checkout; where the tests lie without it, for an installed package, who asks for one is skipped."""
    if not (ROOT / name).exists() and not (ROOT / "setup.py").is_file():
        pytest.skip(f"needs the checkout: {name}", allow_module_level=True)
    return ROOT / name
