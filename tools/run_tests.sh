#!/bin/sh
# The whole test suite, or the tests named. Called by `make test`.
# Two parts run beside each other: tests on a real Slurm, which wait for Slurm's clocks, then unit tests,
# which mostly use one core; and all that start ranks. The first part's report comes at the end.
set -u
python=.venv/bin/python
[ $# = 0 ] || exec "$python" -m pytest "$@"

report=$(mktemp)
"$python" -m pytest tests/slurm tests/unit >"$report" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$report"' EXIT
trap 'exit 130' INT TERM
"$python" -m pytest --ignore=tests/slurm --ignore=tests/unit
failed=$?
wait "$beside" || failed=1
cat "$report"
[ "$failed" = 0 ] || { echo "make test: failed" && exit 1; }
echo "make test: both parts passed"
