# Sourced by the launchers: starts a command and returns the exit code of the run, which torchrun and deepspeed lose.
#   name_run [finetune] ARGUMENTS...   those of tnl pretrain or tnl finetune. Sets command (which of them), the arrays
#                           arguments (all) and run (CONFIG [section.key=value ...] of them), and start, the file that
#                           stands for this start: for the option --start-file
#   supervise COMMAND...    after name_run
# SIGTERM and Ctrl-C ask the run to save a checkpoint and stop, however long that takes; it then ends with 75. They reach
# nothing but what was started here, whoever else trains in the run folder.
#
# PYTHON    the interpreter to use; default that of .venv, or else python3

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=$root/.venv/bin/python
  [[ -x $PYTHON ]] || PYTHON=python3
fi

name_run() {
  command=pretrain
  case ${1:-} in
    pretrain | finetune)
      command=$1
      shift
      ;;
  esac
  arguments=("$@") run=()
  while (($#)); do
    case $1 in
      --resume) shift $(($# > 1)) ;; # and its value
      -*) ;;
      *) run+=("$1") ;;
    esac
    shift
  done
  start=$(mktemp -d)/start
}

ask_to_stop() {
  asked=$1
  # A run that has not begun to train has nothing to save. In a session of its own: a second Ctrl-C is for this script.
  if ! setsid "$PYTHON" -m tnl stop --start-file "$start" "${run[@]}"; then
    echo "ending what this launcher started" >&2
    kill -TERM "$child" 2>/dev/null || true
  fi
}

end_all() {
  # Of its session: DeepSpeed's launcher leaves what it started behind when a signal ends it.
  kill -TERM -- "-$child" 2>/dev/null || true
  rm -rf "$(dirname "$start")"
}

supervise() {
  local code=0
  asked=0
  # In a session of its own, away from the terminal: its Ctrl-C would reach torchrun, which kills after 30 seconds.
  setsid "$@" &
  child=$!
  trap 'ask_to_stop 143' TERM HUP
  trap 'ask_to_stop 130' INT
  trap end_all EXIT
  # A signal ends the wait, not the child.
  while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
  done
  trap '' TERM HUP INT
  # What ended before the run began is no success; a rank that knows why has said so in the file.
  ((asked == 0)) || code=$asked
  ((code != 0)) || code=70
  (set -o noclobber && echo "$code" >"$start") 2>/dev/null || true
  code=0
  "$PYTHON" -m tnl status --start-file "$start" "${run[@]}" || code=$?
  return "$code"
}
