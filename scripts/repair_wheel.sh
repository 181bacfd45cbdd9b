#!/usr/bin/env bash
# Refuses a wheel that lacks kernels or needs libraries of CUDA; another one gets its manylinux tag.
#
#   scripts/repair_wheel.sh WHEEL FOLDER
#
# Needs auditwheel, which needs patchelf, and readelf.
set -euo pipefail
wheel=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m zipfile -e "$wheel" "$scratch"
# setup.py leaves out what it cannot build; a wheel for everybody is whole.
python3 - "$scratch/dan_fast/_build_info.json" <<'END'
import json
import sys

with open(sys.argv[1]) as file:
    info = json.load(file)
print(info)
whole = info["built"] == ["CPU", "CUDA"] and info["ranking"] and not info["missing"]
sys.exit(not whole and "the wheel lacks something: see `missing` above")
END
readelf -d "$scratch"/dan_fast/*.so | grep -E '^File|NEEDED|R(UN)?PATH' | tee "$scratch/needed"
if grep -q libcud "$scratch/needed"; then
  echo "$wheel needs libraries of CUDA, which a machine without the toolkit lacks" >&2
  exit 1
fi
# The package imports torch before it loads the library, so torch's libraries are neither bundled nor looked for.
auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir "$2" "$wheel"
