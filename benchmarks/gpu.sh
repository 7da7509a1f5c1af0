#!/bin/sh
# Train, export, serve and probe mini and a ViT-B/32 on a GPU; under ten minutes. Writes benchmarks/results/gpu.json.
# PYTHON names the interpreter that has pmgaft; by default the .venv that `make` sets up.
set -eu
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" benchmarks/gpu.py "$@"
