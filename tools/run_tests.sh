#!/bin/sh
# The whole test suite, or the tests named. Called by `make test`.
# Three parts run beside each other: unit tests mostly use one core, and tests on a real Slurm wait for
# Slurm's clocks. What the first part prints is seen at once, the reports of the others come behind it.
set -u
python=.venv/bin/python
[ $# = 0 ] || exec "$python" -m pytest "$@"

reports=$(mktemp -d)
"$python" -m pytest tests/slurm >"$reports/slurm" 2>&1 &
slurm=$!
"$python" -m pytest tests/unit >"$reports/unit" 2>&1 &
unit=$!
trap 'kill "$slurm" "$unit" 2>/dev/null; rm -rf "$reports"' EXIT
trap 'exit 130' INT TERM
"$python" -m pytest --ignore=tests/slurm --ignore=tests/unit
failed=$?
for part in slurm unit; do
    eval "wait \"\$$part\"" || failed=1
    cat "$reports/$part"
done
[ "$failed" = 0 ] || { echo "make test: failed" && exit 1; }
echo "make test: all three parts passed"
