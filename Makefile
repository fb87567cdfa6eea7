PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test check bench gpu clean

help:
	@echo "make demo    train UniFormer on real mp4 files, test it, look at it (runs/demo)"
	@echo "make test    lint, types, tests"
	@echo "make bench   time it all beside its rivals (benchmarks/results); BASE=REF: beside an older self"
	@echo "make gpu     tests, tuning and benchmarks on a GPU in nine minutes; OUT=DIR copies the results"
	@echo "make check   lint and types alone"
	@echo "make setup   fill $(VENV); the others do this first"

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11")'
	@echo "Setting up $(VENV), once: torch first, then the rest (about 2 GB, a minute or two)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/uniformer demo

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In two processes, whose idle threads sleep: they would fight over the cores.
test: check
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist worksteal

# Without them their rows say that they are missing.
$(VENV)/.rivals: $(VENV)/.ready
	@echo "Installing rivals into $(VENV), once: ONNX Runtime and OpenVINO (about 300 MB)"
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[rivals]' && touch $@ || echo "They cannot be installed here: the benchmarks go on without them"

bench: setup $(if $(BASE),,$(VENV)/.rivals)
	$(BIN)/python -m benchmarks.run $(if $(BASE),--base $(BASE),--compiled) $(BENCH)

# With the Python that has the CUDA build of torch: this one's, or PYTHON=...
gpu:
	$(if $(filter file,$(origin PYTHON))$(filter default,$(origin PYTHON)),$(if $(wildcard $(VENV)/.ready),$(BIN)/python,$(PYTHON)),$(PYTHON)) -m benchmarks.gpu $(if $(OUT),--out $(OUT))

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
