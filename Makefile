# Needs Python >= 3.11 and make; everything else is installed into .venv.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
BIN := .venv/bin
PYTHONS ?= $(PYTHON)
SETUP_INPUTS := pyproject.toml scripts/setup_environment.py

.PHONY: demo animation test check unit docs results results-quick results-check gpu vllm release clean

demo: .venv/.ready ## prune a small real model and compare it with the dense one
	$(BIN)/saap demo

animation: .venv/.ready-dev ## record the demo's run in a terminal and draw it for the README (minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/terminal_animation.py record \
		"saap prune smollm2 --pruning-ratio 0.2 --preset fast -o small/"
	$(BIN)/python scripts/terminal_animation.py draw
	$(BIN)/python benchmarks/book.py render

test: check unit ## everything that has to pass

check: .venv/.ready-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: .venv/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --dist loadscope

docs: .venv/.ready-dev ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

results: .venv/.ready-dev ## measure missing results (hours; resumable), then its pages
	$(BIN)/python benchmarks/book.py run

results-quick: .venv/.ready-dev ## a smoke run of every experiment on little of everything, in out/results-quick
	$(BIN)/python benchmarks/book.py run --quick

results-check: .venv/.ready-dev ## list the cells that other code than the present one measured
	$(BIN)/python benchmarks/book.py stale

.venv/.ready: $(SETUP_INPUTS)
	$(if $(PYTHON),,$(error Python 3.11 or newer was not found; name one with `make PYTHON=...`))
	$(PYTHON) scripts/setup_environment.py
	@touch $@

.venv/.ready-dev: $(SETUP_INPUTS)
	$(if $(PYTHON),,$(error Python 3.11 or newer was not found; name one with `make PYTHON=...`))
	$(PYTHON) scripts/setup_environment.py --dev
	@touch .venv/.ready $@

gpu: .venv/.ready-dev ## what only an accelerator can show (20 minutes on one card; resumable)
	$(BIN)/python benchmarks/book.py run accelerator

vllm: .venv/.ready-dev .vllm/.ready ## serve a pruned real model with vLLM and compare it with transformers (10 minutes)
	$(BIN)/python scripts/serve_in_vllm.py

.vllm/.ready: scripts/setup_environment.py .venv/.ready-dev
	$(BIN)/python scripts/setup_environment.py --vllm
	@touch $@

release: .venv/.ready-dev ## build sdist and wheel in dist/; try both in new environments, of PYTHONS="python3.12 ..." too
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/pytest tests/packaging
	$(BIN)/python scripts/try_release.py $(PYTHONS)

clean:
	rm -rf .venv .vllm build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
