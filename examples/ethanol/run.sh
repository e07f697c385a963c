#!/usr/bin/env bash
# Sets up an environment in .venv and runs the main job.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
.venv/bin/pip install --quiet --disable-pip-version-check -e ".[pyscf,tblite]" -c constraints.txt
.venv/bin/bnn-driver run "${1:-examples/ethanol/bnn.toml}"
