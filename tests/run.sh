#!/usr/bin/env bash
# Sets up an environment in .venv and runs every test that this machine can run.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
.venv/bin/pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
.venv/bin/ruff check bnn_driver oracles tests examples
.venv/bin/ruff format --check bnn_driver oracles tests examples
.venv/bin/mypy
if [ $# -gt 0 ]; then
  .venv/bin/python -m pytest "$@"
else
  # side by side: most tests wait for programs that start; those of faults print a table at their end, and those of a time that ends
  # come last, when nothing else slows what they start
  told=$(mktemp)
  failed=0
  last=tests/loops/test_wall_limit.py
  .venv/bin/python -m pytest tests/faults >"$told" 2>&1 &
  faults=$!
  trap 'kill $faults 2>/dev/null || true; rm -f "$told"' EXIT
  .venv/bin/python -m pytest -n "${BNN_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder \
    --ignore=tests/faults --ignore="$last" || failed=1
  wait $faults || failed=1
  cat "$told"
  .venv/bin/python -m pytest "$last" || failed=1
  exit $failed
fi
