# make demo | test | lint | bench | clean. Each does all set-up first (tools/bootstrap.sh).
# Options: STEPS=20 make demo (a two-minute check), GRID=full make bench (two hours), PYTHON=/path/to/python3.12.
.PHONY: demo test lint bench clean setup
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR)
export PYTHON
# A command ends with make, also where make is killed (megatron_mone/common/child_processes.py).
TIED := MEGATRON_MONE_STARTER=$$PPID exec

setup:
	@sh tools/bootstrap.sh

demo: setup
	@$(TIED) $(PY) -m tools.demo $(if $(STEPS),--steps $(STEPS))

test: setup
	@$(TIED) $(PY) -m tools.run_tests $(TESTS)

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

bench: setup
	@$(TIED) $(PY) -m tools.bench_experts --grid $(or $(GRID),quick)

clean:
	rm -rf out build .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
