#!/usr/bin/env bash
# Pretrains or tunes on several machines: start it on each, with the same arguments but the rank; ends with the run's exit code.
#
#   bash scripts/launch_nodes.sh NODES NODE_RANK HOST:PORT [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]
#
# HOST:PORT is the machine with rank 0 and a free port there. The run folder must be on a file system that all share.
# GPUS    number of processes on this machine; default one for each GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
if (($# < 4)) || [[ $3 != *:* ]]; then
  echo "usage: bash scripts/launch_nodes.sh NODES NODE_RANK HOST:PORT [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]" >&2
  exit 2
fi
nodes=$1 rank=$2 host=${3%:*} port=${3##*:}
shift 3
name_run "$@"
supervise "$PYTHON" -m torch.distributed.run --nnodes "$nodes" --node-rank "$rank" --master-addr "$host" \
  --master-port "$port" --nproc-per-node "${GPUS:-gpu}" -m tnl "$command" --start-file "$start" "${arguments[@]}"
