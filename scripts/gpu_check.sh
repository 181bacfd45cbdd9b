#!/usr/bin/env bash
# Builds, measures, tests and sanitizes on a machine with an NVIDIA GPU, without the network, within 9 minutes.
#
#   OUT=folder PYTHON=python3 scripts/gpu_check.sh [--dry-run]
#
# Every part has a time limit and a log in OUT (build/gpu_check unless set), and the later ones run whatever became of
# the earlier ones. summary.txt says how each ended; the exit status is 1 if one failed. memory.json, attention.json,
# iteration.json and ranking.json hold the benchmarks; they and the folder quickstart are removed from OUT first.
# --dry-run prints the commands only. GPU_TESTS_S and the like below change a limit.
set -uo pipefail
called_from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

case ${1:-} in
  "") dry_run=false ;;
  --dry-run) dry_run=true ;;
  *)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
# Names are those of the folder that this was called from.
from_there() {
  case $1 in /*) echo "$1" ;; *) echo "$called_from/$1" ;; esac
}
out=$([ -n "${OUT:-}" ] && from_there "$OUT" || echo build/gpu_check)
python=${PYTHON:-python3}
case $python in */*) python=$(from_there "$python") ;; esac
failed=0

# With 30 s for the first and third part the limits add up to 540 s.
BUILD_S=${BUILD_S:-60}
BENCH_S=${BENCH_S:-90}
HEAD_BENCH_S=${HEAD_BENCH_S:-30}
ITERATION_BENCH_S=${ITERATION_BENCH_S:-60}
RANKING_BENCH_S=${RANKING_BENCH_S:-40}
GPU_TESTS_S=${GPU_TESTS_S:-110}
QUICKSTART_S=${QUICKSTART_S:-30}
SANITIZER_S=${SANITIZER_S:-30}

summarize() {
  echo "$*" | tee -a "$out/summary.txt"
}

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$2 status start
  shift 2
  if $dry_run; then
    echo "$name, at most $limit s: ${*//$'\n'/; }"
    return
  fi
  echo "== $name"
  start=$SECONDS
  # The second signal is for what does not end at the first.
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  if [ "$status" -eq 0 ]; then
    summarize "ok   $name ($((SECONDS - start)) s)"
    return
  fi
  failed=1
  tail -n 25 "$out/$name.log"
  case $status in
    124 | 137) summarize "FAIL $name (time limit of $limit s)" ;;
    127) summarize "FAIL $name ($1 was not found)" ;;
    *) summarize "FAIL $name (exit status $status after $((SECONDS - start)) s)" ;;
  esac
}

# sanitize TOOL
sanitize() {
  part "$1" "$SANITIZER_S" compute-sanitizer --tool "$1" --error-exitcode 9 "$python" scripts/small_steps.py cuda
}

if ! $dry_run; then
  mkdir -p "$out" || exit 2
  out=$(cd "$out" && pwd)
  # A part that fails must not leave the results of an earlier run, and quickstart would go on with its training.
  rm -rf "$out/quickstart" "$out"/{memory,attention,iteration,ranking}.json
  : >"$out/summary.txt"
fi
# Triton and torch.compile keep what they compile in the user's home otherwise.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/dan_fast_gpu_check/triton}

part machine 10 nvidia-smi
part build "$BUILD_S" "$python" -m pip install --no-build-isolation --no-deps -e .
part doctor 20 "$python" -m dan_fast doctor
# Benchmarks before the tests, which leave a GPU warm. The paper's size first: memory.json is written anew after every
# size, and the limit cuts off the rest. torch.compile needs minutes for the unrolled steps and has no place here.
part bench "$BENCH_S" "$python" -m dan_fast bench memory --device cuda --slots_scale 1,0.25,16 --budget_s 2 \
  --contenders literal_autograd,literal_in_place,score_space,kernels --json "$out/memory.json"
part head_bench "$HEAD_BENCH_S" "$python" -m dan_fast bench attention --device cuda --contenders eager,kernels \
  --json "$out/attention.json"
part iteration_bench "$ITERATION_BENCH_S" "$python" -m dan_fast bench iteration --device cuda --budget_s 15 \
  --json "$out/iteration.json"
part ranking_bench "$RANKING_BENCH_S" "$python" -m dan_fast bench ranking --device cuda --queries 1000 --repeat 3 \
  --memory_queries 2000 --memory_gallery 20000 --budget_s 5 --json "$out/ranking.json"
# In one process: tests of memory, of streams and of a host that does not wait have the GPU to themselves, and Triton
# compiles each kernel once.
part gpu_tests "$GPU_TESTS_S" "$python" -m pytest -q -n 0 -m gpu -p no:cacheprovider tests
part quickstart "$QUICKSTART_S" "$python" -m dan_fast quickstart --out "$out/quickstart" --epochs 1 --identities 12
# scripts/ is in the path of a script that lies there, and the checkout is not.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Without PyTorch's allocator, which cuts tensors out of blocks of 2 MiB and more, memcheck sees where each tensor ends;
# of a workspace that kernels divide (csrc/cuda/arena.h) only where the whole ends.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck
sanitize racecheck
sanitize synccheck

if $dry_run; then
  exit 0
fi
echo "== summary"
cat "$out/summary.txt"
exit "$failed"
