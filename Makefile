# make demo: install, then the doctor and the lab on real data, and an HTML report.
# make test: install if need be, then the checks and the tests. CI calls this.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DONE   := $(VENV)/.installed

# The tests start a hundred processes that import torch: 1.5 s from bytecode, 5 s where that may not be written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test tests check bench docs gpu clean

# Without compiling every module of every package: Python does so at the first import of those that are used.
install: $(DONE)

$(DONE): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("steadynorm needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(DONE)

demo: install
	$(BIN)/steadynorm demo

check: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

# The checks run beside the tests, on a core that starting the tests leaves idle.
test: install
	$(MAKE) --jobs=2 check tests

# One thread for each of the two runs, and for the processes that they start: they have no more cores.
tests: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

docs: install
	$(BIN)/python -c 'from pathlib import Path; from steadynorm.doctor import pages; pages.write(Path("docs/rules"))'

bench: install
	$(BIN)/python -m benchmarks.batch_norm

# Where there is a CUDA device, with the torch and Triton that are there: what has to hold on it, then how fast it is.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -n 12 -m "gpu and not slow" tests/kernels tests/layers
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --no-compile

clean:
	rm -rf $(VENV) demo reports .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
