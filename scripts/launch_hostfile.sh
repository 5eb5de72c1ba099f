#!/usr/bin/env bash
# Pretrains or tunes on the machines of a hostfile (lines "HOST slots=GPUS") by DeepSpeed's launcher, over ssh without password.
#
#   bash scripts/launch_hostfile.sh HOSTFILE [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]
#
# That launcher ends with 0 when a signal killed its processes; this script ends with the exit code of the run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/supervise.sh"
if (($# < 2)); then
  echo "usage: bash scripts/launch_hostfile.sh HOSTFILE [finetune] CONFIG [section.key=value ...] [--fresh] [--resume STEP]" >&2
  exit 2
fi
hostfile=$1
shift
# DeepSpeed's launcher would go on with this machine alone.
[[ -f $hostfile && -r $hostfile ]] || { echo "error: $hostfile: no such hostfile" >&2; exit 2; }
name_run "$@"
supervise "$PYTHON" -m deepspeed.launcher.runner --hostfile "$hostfile" --no_local_rank --module \
  tnl "$command" --start-file "$start" "${arguments[@]}"
