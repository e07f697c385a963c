#!/usr/bin/env bash
# Sets up an environment in .venv, makes what is known, and explores.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
.venv/bin/pip install --quiet --disable-pip-version-check -e ".[pyscf,tblite]" -c constraints.txt
[ -f examples/eigen_explore/known.extxyz ] || OMP_NUM_THREADS=1 .venv/bin/python examples/zundel_qbc/make_pool.py --frames 60 \
  --config examples/eigen_explore/bnn.toml --output examples/eigen_explore/known.extxyz
.venv/bin/bnn-driver explore examples/eigen_explore/bnn.toml
