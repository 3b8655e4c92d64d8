#!/usr/bin/env bash
# Trains and evaluates one preset after another, unattended; a closed terminal does not stop it.
# All flags are those of scripts/pipeline.py: bash scripts/pipeline.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
# Set here as well, for the moment before Python ignores it itself.
trap '' HUP
exec "$python" scripts/pipeline.py "$@"
