# make demo | test | lint | bench | clean. Each does all set-up first (tools/bootstrap.sh).
# Options: STEPS=20 make demo (a two-minute check), PYTHON=/path/to/python3.12.
.PHONY: demo test lint bench clean setup
PY := .venv/bin/python
export PYTHONPATH := $(CURDIR)
export PYTHON

setup:
	@sh tools/bootstrap.sh

demo: setup
	@$(PY) -m tools.demo $(if $(STEPS),--steps $(STEPS))

test: setup
	@$(PY) -m pytest $(TESTS)

lint: setup
	@$(PY) -m ruff check . && $(PY) -m ruff format --check . && $(PY) -m mypy

bench: setup
	@$(PY) -m tools.bench_experts

clean:
	rm -rf out build .hypothesis .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
