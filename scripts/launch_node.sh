#!/usr/bin/env bash
# Pretrains or tunes on all GPUs of this machine; ends with the exit code of the run.
#
#   bash scripts/launch_node.sh [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]
#
# GPUS    number of processes; default one for each GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
if (($# == 0)); then
  echo "usage: bash scripts/launch_node.sh [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]" >&2
  exit 2
fi
name_run "$@"
supervise "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${GPUS:-gpu}" \
  -m tnl "$command" --start-file "$start" "${arguments[@]}"
