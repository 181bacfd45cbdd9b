#!/usr/bin/env bash
# Trains one network three ways for the same number of epochs and evaluates each beside the untrained network and
# chance: the paper's DAML3, DAML1 (plain SGD on L_total, Table IX) and DAML3 without unlabelled images.
#
#   scripts/compare_procedures.sh LABELED UNLABELED OUT [FLAG ...]
#
# LABELED and UNLABELED are dataset folders; both are targets too. OUT receives a run folder and a JSON of figures
# for each. FLAGs go to every `dan-fast train`, for example --optimizer.epochs 8 --model.backbone resnet18.
# A run that was interrupted or killed continues when the script is started again.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
labeled=$1 unlabeled=$2 out=$3
shift 3

run() {
  local name=$1
  shift
  dan-fast train --data.labeled "$labeled" --run.out "$out/$name" --run.resume auto --recipe paper "$@"
  dan-fast evaluate --checkpoint "$out/$name/checkpoint.pt" --targets "[$unlabeled, $labeled]" --baselines true \
    --out "$out/$name.json"
}

run daml3 --data.unlabeled "$unlabeled" --meta.procedure daml3 "$@"
run daml1 --data.unlabeled "$unlabeled" --meta.procedure daml1 "$@"
run without_unlabeled --meta.procedure daml3 "$@"
