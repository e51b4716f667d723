#!/usr/bin/env bash
# Ten minutes on one GPU: both rows without pretraining trained whole, pretraining's largest batches, GPU against CPU.
# At home first:  python training_scripts/gpu_check.py pack --kvasir-seg ... --cvc-clinicdb ... --output gpu-cache
# On the machine: training_scripts/gpu_check.sh gpu-cache gpu-results [--small]
# At home again:  polypseg evaluate --predictions gpu-results/rows/predictions/RN-NA-NA/kvasir_seg \
#                   --dataset kvasir_seg --split reference --part test --name RN-NA-NA
# Needs torch, timm, transformers, accelerate and this repository; nothing is fetched.
set -euo pipefail
if [[ $# -lt 2 ]]; then
  echo "usage: $0 CACHE OUTPUT [--small]" >&2
  exit 2
fi
cache=$1 output=$2
shift 2
here="$(cd "$(dirname "$0")/.." && pwd)"
export PYTHONPATH="$here/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
python=${PYTHON:-python3}
[[ -x "$here/.venv/bin/python" ]] && python=${PYTHON:-$here/.venv/bin/python}
workers=$(($(nproc) > 4 ? 8 : 0))
# Each step has its limit, so that one that is slow here does not cost the others; what it had measured is kept.
limit() {
  local seconds=$1 step=$2
  shift 2
  echo "== $step (at most $seconds s)"
  timeout --signal=INT --kill-after=30 "$seconds" "$python" "$here/training_scripts/gpu_check.py" run "$cache" \
    --output "$output/$step" --step "$step" --workers "$workers" "$@" || echo "$step ended with code $?"
}
limit "${DEVICES_SECONDS:-60}" devices "$@"
limit "${ROWS_SECONDS:-420}" rows "$@"
limit "${PRETRAINING_SECONDS:-120}" pretraining "$@"
ls "$output"/*/gpu_check.json
