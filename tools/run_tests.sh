#!/bin/sh
# The whole test suite, or the tests named. Called by `make test`.
# Two rows of tests run beside each other, about as long: tests on a real Slurm, which wait for Slurm's
# clocks, then unit tests; and all that start ranks, then the rest of the unit tests. The first row's
# report comes at the end.
set -u
python=.venv/bin/python
[ $# = 0 ] || exec "$python" -m pytest "$@"

rest="tests/unit/benchmarking tests/unit/cpu_emulation"
report=$(mktemp)
# shellcheck disable=SC2046,SC2086
"$python" -m pytest tests/slurm tests/unit $(printf -- '--ignore=%s ' $rest) >"$report" 2>&1 &
beside=$!
trap 'kill "$beside" 2>/dev/null; rm -f "$report"' EXIT
trap 'exit 130' INT TERM
failed=0
"$python" -m pytest --ignore=tests/slurm --ignore=tests/unit || failed=1
# shellcheck disable=SC2086
"$python" -m pytest $rest || failed=1
wait "$beside" || failed=1
cat "$report"
[ "$failed" = 0 ] || { echo "make test: failed" && exit 1; }
echo "make test: all parts passed"
