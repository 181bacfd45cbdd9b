"""What the build and the installed package share; setup.py runs this file: it imports the standard library only."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("csrc", "python_bindings")
# What to do about native code that is missing or old, at the end of a sentence.
AGAIN = "reinstall dan_fast (from a checkout: pip install -e .)"

_NVCC_FLAGS = ("-O3", "-std=c++17")
# In csrc/memory a * b + c is never contracted into one rounding: the rules of a slot shall give the same bits on every
# path. The attention head makes no such promise, and its products are faster contracted.
_UNCONTRACTED = "/csrc/memory/"


def nvcc_flags(source: Path) -> tuple[str, ...]:
    """How nvcc compiles a file, whatever the GPU."""
    contracts = _UNCONTRACTED not in source.resolve().as_posix()
    return _NVCC_FLAGS if contracts else (*_NVCC_FLAGS, "-fmad=false")


def source_files(root: Path) -> Iterator[Path]:
    """The files of the native sources under `root`, in one order; pages and what an editor leaves are none."""
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not hidden and not path.name.endswith(("~", "#", ".md")):
                yield path


def source_hash(root: Path) -> str:
    """A digest of all native sources under `root`; it tells a binary that is older than its checkout."""
    digest = hashlib.sha256()
    for path in source_files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
