"""The digest of the native sources; setup.py runs this file, so it imports nothing but the standard library."""

import hashlib
from pathlib import Path

ROOMS = ("csrc", "python_bindings")


def source_hash(root: Path) -> str:
    """A digest of every native source under `root`, by which a binary older than its checkout is recognised."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.*")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
