#!/usr/bin/env bash
# Sets up .venv, then runs the linter and the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment "dev"
cd "$root"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Nothing is fetched at test time.
export HF_HUB_OFFLINE=1 WANDB_MODE=offline TOKENIZERS_PARALLELISM=false
# A file stays in one process: its fixtures are made once.
exec .venv/bin/python -m pytest --numprocesses auto --dist loadfile "$@"
