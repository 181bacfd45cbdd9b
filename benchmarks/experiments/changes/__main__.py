"""Changes of the method that were tried and did not become settings, because no figure supports one.

docs/tried.md and docs/experiments.md have their figures.

    python benchmarks/experiments/changes uniform_slots --config benchmarks/experiments/base.yaml --recipe dan ...

trains as `dan-fast train` with these settings does, with the change, and fails where the settings left it without an
effect. Each is a context in which the package is changed; resuming, several ranks and meta.order 2 are not thought of.
"""

import sys

import attention as attention
import memory as memory
import normalisation as normalisation
import steps as steps
import unlabelled as unlabelled
from registry import CHANGES, HAD

from dan_fast.cli import main

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in CHANGES:
        listed = "\n".join(f"  {name}: {made.__doc__.splitlines()[0]}" for name, made in CHANGES.items())
        sys.exit(f"usage: python {sys.argv[0]} CHANGE [settings of dan-fast train]\n{listed}")
    HAD.clear()
    with CHANGES[sys.argv[1]]():
        code = main(["train", *sys.argv[2:]])
    if code == 0 and sys.argv[1] not in HAD:
        sys.exit(f"{sys.argv[1]} had no effect with these settings; its docstring says what it is for.")
    sys.exit(code)
