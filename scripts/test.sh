#!/usr/bin/env bash
# Lint, types, 20 kills and the fast tests, in .venv, which is made if it is not there. What CI runs.
# Further arguments go to pytest, which is then all that is run: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements-dev.txt

export HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
# Two processes of one thread each beat one of two: the tests' models are tiny.
export OMP_NUM_THREADS=1
if [ $# -eq 0 ]; then
    echo "== ruff"
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    echo "== pyright"
    .venv/bin/pyright
    echo "== runs killed and resumed"
    .venv/bin/python tests/stress/crash.py --kills 20 --stops 5 --seed 1
fi
echo "== pytest"
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
