# Everything goes into .venv and build/. `make help` lists the targets.

PYTHON ?= python3
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup wheel test-wheel stock real-models demo test test-all test-agents browser test-kernels sanitize lint bench bench-report gpu metal bench-server bench-server-report results-measure results models reference patches worktree lock clean

help: ## what can be made
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' Makefile

setup: ## .venv, the patched llama.cpp and this package, editable
	@$(PYTHON) scripts/setup.py

demo: setup ## a real model talks; then a text far past a model's training length, FILE=path for your own
	@$(BIN)/lminf-edge demo --talk $(if $(FILE),--file "$(FILE)")

wheel: ## the wheel that carries everything, into dist/, checked; ARGS="GGML_CUDA=ON" adds a module for GPUs
	@$(PYTHON) scripts/setup.py --tools
	@$(BIN)/python scripts/wheel.py $(ARGS)

test-wheel: ## the wheel of make wheel, installed without compilers, and on emulated CPUs; ARGS="root x86" for a part of it
	@$(PYTHON) scripts/setup.py --tools
	@OMP_WAIT_POLICY=passive $(BIN)/python scripts/test_wheel.py $(ARGS)

stock: ## llama.cpp without our patches as well, for tests and benchmarks to compare with
	@$(PYTHON) scripts/setup.py --stock

# passive: where tests share the cores with other work, OpenMP threads that spin while they wait take ten times as long
# most tests use one thread: two at a time, the tests of a file in one process as they share models
test: stock ## the whole test suite; ARGS="-k name" for a part of it
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-all: test browser ## make test, then the server with a real browser, node clients, kills and load
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e

test-agents: browser real-models ## hundreds of turns of agents by each API, and Codex and Claude Code themselves: an hour
	@cd tests/e2e && npm install --no-audit --no-fund --silent --no-save @openai/codex @anthropic-ai/claude-code
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests/e2e/test_agents.py tests/e2e/test_agent_programs.py

browser: setup # what the tests of the page and of node clients need, beside Chromium and node themselves
	@command -v npm > /dev/null || { echo "error: node and npm are needed: apt-get install nodejs npm" >&2; exit 1; }
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || \
		{ echo "error: Chromium is needed: apt-get install chromium" >&2; exit 1; }
	@$(BIN)/python -c "import playwright" 2> /dev/null || $(BIN)/python -m pip install -q playwright
	@cd tests/e2e && { [ -d node_modules/@anthropic-ai/sdk ] || npm install --no-audit --no-fund --silent; }

test-kernels: setup ## kernels against float64, on and for all that is here, llama.cpp's own tests; ARGS="cpu chat" for some
	@$(PYTHON) scripts/test_kernels.py $(ARGS)

sanitize: setup ## the CPU kernels and the whole library under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(PYTHON) scripts/test_kernels.py sanitize library

lint: setup ## ruff and mypy
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: stock ## measure docs/performance again: 15 minutes on an idle machine; ARGS="--only positions" for a part of it
	@$(BIN)/python benchmarks/speed.py $(ARGS)
	@$(BIN)/python benchmarks/report.py

bench-report: setup ## docs/performance.md and its plot from the figures measured last, in seconds
	@$(BIN)/python benchmarks/report.py

gpu: setup ## build for this machine's NVIDIA GPU, test there, measure it: half an hour; ARGS="--only operations"
	@$(BIN)/python benchmarks/gpu.py --backend cuda $(ARGS) && $(BIN)/python benchmarks/report.py

metal: setup ## the same for a Mac's GPU; has never been run
	@$(BIN)/python benchmarks/gpu.py --backend metal $(ARGS) && $(BIN)/python benchmarks/report.py

bench-server: setup ## measure docs/server-performance again: 45 minutes; ARGS="--only cold" for a part of it
	@$(BIN)/python benchmarks/server_speed.py $(ARGS)
	@$(BIN)/python benchmarks/server_report.py

bench-server-report: setup ## docs/server-performance.md from the figures measured last, in seconds
	@$(BIN)/python benchmarks/server_report.py

results-measure: setup ## measure docs/results again, hours: TEXT="book.txt ..."; ARGS="--only loss" for a part of it
	@$(BIN)/python benchmarks/evidence.py $(if $(TEXT),--text $(TEXT)) $(ARGS)
	@$(BIN)/python benchmarks/results.py

results: setup ## docs/results.md and its plots from the figures measured last, in seconds
	@$(BIN)/python benchmarks/results.py

models: setup ## docs/models.md: what happens to every architecture of llama.cpp
	@$(BIN)/python scripts/models.py $(ARGS)

reference: setup ## docs/commands.md and docs/api.md, from the parsers, signatures and docstrings
	@$(BIN)/python scripts/reference_pages.py

real-models: ## two real pretrained models for tests and measurements, into build/models: 350 MB
	@$(PYTHON) scripts/real_models.py

worktree: setup ## a git work tree of llama.cpp with one commit per patch, in build/worktree
	@$(BIN)/python scripts/upstream.py worktree

patches: ## regenerate patches/ from build/worktree
	@$(BIN)/python scripts/upstream.py export

lock: setup ## requirements-dev.lock: the newest versions of all that development needs, for every Python and system
	@$(BIN)/python -m pip install -q uv
	@printf 'cmake\nninja\nscikit-build-core\n' | $(BIN)/uv pip compile pyproject.toml - --extra dev --universal --python-version 3.10 \
		--upgrade --no-emit-package lminf-edge --no-annotate --custom-compile-command "make lock" --quiet --output-file requirements-dev.lock

clean: ## remove everything that was built or installed
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
