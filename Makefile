PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help setup demo lint test docs clean

help:
	@echo "make demo    convert, distill and run the embedded teacher (minutes on two CPU cores)"
	@echo "make test    lint, type check and tests"
	@echo "make lint    ruff and mypy only"
	@echo "make docs    build the documentation into build/site"
	@echo "make setup   create .venv and install the package into it, editable"
	@echo "make clean   remove .venv, caches and built packages; runs/ stays"

setup: $(STAMP)

# pip picks the CUDA build of torch on Linux unless another index or an installed build says otherwise.
$(STAMP): pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("mla-convert needs Python 3.10 or newer, not " + sys.version.split()[0] + ": make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c tests/constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/mla-convert demo

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mla_convert

# One thread a worker: more of them on the same cores only wait for each other.
test: export OMP_NUM_THREADS := 1
test: export MKL_NUM_THREADS := 1
test: lint
	$(BIN)/python -m pytest -n $(WORKERS)

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(STAMP)
	$(BIN)/mla-convert recipes reference > docs/recipes.md
	$(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
