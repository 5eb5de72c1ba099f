# Sourced by quickstart.sh and test.sh: makes .venv and installs this checkout with the tested versions, once.
#   setup_environment EXTRAS      EXTRAS: comma-separated extras of setup.py, or empty
#
# PYTHON            the interpreter to use; default python3
# TORCH_INDEX_URL   where pip takes torch from; default PyPI's build for this machine

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

setup_environment() {
  local extras=$1 python=${PYTHON:-python3} venv="$root/.venv" stamp
  if ! command -v "$python" >/dev/null; then
    echo "error: no $python found; install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv)" >&2
    exit 2
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version) is too old, 3.11 or newer is needed; install one and start again with PYTHON=python3.12 $0" >&2
    exit 2
  fi
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    echo "error: $python has no venv module; install it (Debian, Ubuntu: apt install python3-venv)" >&2
    exit 2
  fi
  # Installed anew when the pins, the packaging, the interpreter or the place of the checkout change.
  stamp=$venv/installed-${extras:-base}-$(cat "$root/constraints.txt" "$root/setup.py" \
    <(echo "$root ${TORCH_INDEX_URL:-}" && "$python" --version) | sha256sum | cut -c1-16)
  if [[ ! -e $stamp ]]; then
    echo "installing into $venv (once; torch is large)"
    # A set-up that was interrupted leaves a venv without pip.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
    rm -f "$venv"/installed-"${extras:-base}"-*
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$root/constraints.txt")
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
      # Only torch itself: that index holds other versions of what torch needs.
      "${pip[@]}" --index-url "$TORCH_INDEX_URL" --no-deps torch
    fi
    # DeepSpeed compiles nothing: the operators that training uses are torch's own.
    DS_BUILD_OPS=0 "${pip[@]}" --editable "$root${extras:+[$extras]}"
    touch "$stamp"
  fi
}
