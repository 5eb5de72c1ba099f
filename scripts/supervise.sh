# Sourced by the launchers: starts a command and returns the exit code of the run, which torchrun and deepspeed lose.
#   name_run ARGUMENTS...   those of tnl pretrain; the array run then holds CONFIG [section.key=value ...] of them
#   supervise COMMAND...    after name_run
# SIGTERM and Ctrl-C ask the run to save a checkpoint and stop, however long that takes; it then ends with 75.
#
# PYTHON    the interpreter to use; default that of .venv, or else python3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$root/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

name_run() {
  run=()
  while (($#)); do
    case $1 in
      --resume) shift $(($# > 1)) ;; # and its value
      -*) ;;
      *) run+=("$1") ;;
    esac
    shift
  done
}

ask_to_stop() {
  # A run that has not begun to train has nothing to save.
  "$PYTHON" -m tnl stop "${run[@]}" || kill -TERM "$1" 2>/dev/null || true
}

supervise() {
  local child code=0 since
  since=$(date +%s.%N)
  "$@" &
  child=$!
  # shellcheck disable=SC2064 # the child is known now
  trap "ask_to_stop $child" TERM INT
  # A signal ends the wait, not the child.
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true
  done
  "$PYTHON" -m tnl status "${run[@]}" --since "$since" || code=$?
  return "$code"
}
