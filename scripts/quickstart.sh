#!/usr/bin/env bash
# From nothing to a trained, evaluated, talking TransNormerLLM: sets up .venv, then runs `tnl quickstart`.
#
#   bash scripts/quickstart.sh                  the sources of Python's standard library
#   bash scripts/quickstart.sh --text DIR       your own text files
#   bash scripts/quickstart.sh --dataset NAME   a dataset of the Hugging Face hub
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment ""
exec "$root/.venv/bin/tnl" quickstart "$@"
