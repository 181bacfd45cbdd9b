#!/usr/bin/env bash
# Installs a wheel into an empty environment with one release of torch, and tests it there away from its sources: a step
# of the memory with nothing but the base dependencies, then the fast tests.
#
#   scripts/check_wheel.sh WHEEL REQUIREMENT [PYTHON]     # scripts/check_wheel.sh dist/*cp311*.whl 'torch==2.11.*'
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheel=$(realpath "$1")
torch=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${3:-python3}" -m venv "$scratch/venv"
export PATH=$scratch/venv/bin:$PATH
unset PYTHONPATH
mkdir -p "$scratch/alone/scripts"
cp -r "$root/tests" "$root/pyproject.toml" "$scratch/alone" # pytest's settings
cp "$root/scripts/make_splits.py" "$scratch/alone/scripts"  # the images of a dataset's persons, which many tests lay out
cd "$scratch/alone"

pip install --quiet "$wheel" "$torch"
dan-fast doctor
python -W error::RuntimeWarning - <<'END'
import torch

from dan_fast import MemoryState, _extension, _ranking, functional, reference

assert _extension.why_not_on("cpu") is None and _extension.has_cuda_kernels(), _extension.why_not()
torch.manual_seed(0)
states = [MemoryState.empty(slots, 16) for slots in (40, 30)]
for step in range(20):
    keys, unlabeled_keys = torch.randn(2, 8, 16)
    batch = keys, torch.randint(9, (8,)), unlabeled_keys, torch.arange(8) + 8 * step
    fast, literal = (
        room.memory_step(*states, *batch, alpha=0.3, alpha_unlabeled=0.2, beta=0.4) for room in (functional, reference)
    )
    torch.testing.assert_close(fast, literal)
    states = fast.labeled, fast.unlabeled
print(f"torch {torch.__version__}: 20 steps by the kernels are those of the reference; ranking for {_ranking.isa()}")
END

pip install --quiet "${wheel}[test]" "$torch"
pytest -m "not slow and not compile" -q -rs
