# Every target makes its own environment in .venv, from the pins in constraints.txt.
# Another Python: make PYTHON=python3.12 test. Fewer tests: make test TESTS=tests/data. One after another: WORKERS=0.

PYTHON ?= python3
TESTS ?=
WORKERS ?= auto
DEMO ?= runs/demo

BIN := .venv/bin
SPREAD = -n $(WORKERS) --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/ready

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo page test test-all lint docs bench clean
.DEFAULT_GOAL := test

# $(call road,MODULE ARGUMENTS) runs one command in the demo's folder, as a reader of the README would.
define road
	@echo; echo '$$ python -m $(1)'
	@cd $(DEMO) && PYTHONPATH='$(CURDIR)' '$(CURDIR)/$(BIN)/python' -m $(1)
endef

demo: $(READY)
	@mkdir -p $(DEMO)
	$(call road,train)
	$(call road,bnfold.fold ckpt.pt)
	$(call road,export)
	$(call road,export.sample ckpt.onnx --count 20 --seed 1)

page: $(READY) $(DEMO)/ckpt.onnx
	$(call road,export.page ckpt.onnx --serve)

$(DEMO)/ckpt.onnx:
	$(MAKE) demo

# The tests start hundreds of processes: one compiles what all of them import, whatever the environment says of that.
test test-all: export PYTHONDONTWRITEBYTECODE :=

test: $(READY)
	$(BIN)/python -m pytest -q $(SPREAD) $(TESTS)

test-all: $(READY)
	$(BIN)/python -m pytest -q $(SPREAD) -m '' $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'wrote site/; to look at it: python3 -m http.server --directory site'

bench: $(READY)
	set -e; for file in benchmarks/*.py; do $(BIN)/python -m benchmarks.$$(basename $$file .py); done

clean:
	rm -rf .venv build dist runs site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; make PYTHON=... names one" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: bnfold needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1);" \
	         "make PYTHON=... names another" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools setuptools-scm
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
