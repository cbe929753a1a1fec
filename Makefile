PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check lint clean

# One stamp for the environment: rebuilt when the project's own files change.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/installed ## train a small network on digits, quantize it, prove the file
	$(BIN)/halfstep demo

# Two workers on two cores: threads of their own would wait for each other.
test test-all: export OMP_NUM_THREADS = 1

test: .venv/installed ## the tests, under ten minutes on two cores
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: .venv/installed ## also the slow ones
	$(BIN)/python -m pytest -n 2

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## everything that must hold before a commit

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info
