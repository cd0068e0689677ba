#!/bin/sh
# The whole test suite, or the tests named. Called by `make test`.
# Tests on a real Slurm wait for Slurm's clocks most of their time, so they run beside the others and
# their report comes last; without Slurm each of them is skipped by name.
set -u
python=.venv/bin/python
[ $# = 0 ] || exec "$python" -m pytest "$@"

report=$(mktemp)
"$python" -m pytest tests/slurm >"$report" 2>&1 &
on_slurm=$!
trap 'kill "$on_slurm" 2>/dev/null; rm -f "$report"' EXIT
trap 'exit 130' INT TERM
"$python" -m pytest --ignore=tests/slurm
others=$?
wait "$on_slurm"
slurm=$?
cat "$report"
[ "$others" = 0 ] && [ "$slurm" = 0 ] && echo "make test: all parts passed" && exit 0
echo "make test: failed (status $others; on Slurm $slurm)"
exit 1
