# make demo   sets up what is missing, then quantizes the demo models, measures them and answers a prompt
# make test   sets up what is missing, then lints, checks types and runs the tests
# make lint   checks style, types, and that imports point one way between the packages
# make sanitize  runs the tests of the CPU kernels and of malicious files under address and undefined-behaviour
#             sanitizers
# make interop  runs the tests with GPTQModel, optimum and AutoGPTQ, in separate environments under build/interop;
#             GPTQ_BELLE_PEER_GPTQMODEL and GPTQ_BELLE_PEER_AUTOGPTQ name the python of ones that exist
# make clients  runs the tests with openai, litellm, langchain and other clients, in environments under build/clients
# make wheel  builds a wheel with the CPU kernels into dist, for every Python 3 on this platform; the machine that
#             installs it needs no compiler
# make clean  removes the environment and everything that was built
#
# PYTHON names the interpreter that makes the environment (3.11 or newer). On Linux the default build of torch brings
# the CUDA libraries along; where there is no GPU, point pip at PyTorch's CPU builds (PIP_EXTRA_INDEX_URL) beforehand.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.ready

.PHONY: demo test lint sanitize interop clients wheel clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/gptq-belle demo

# A test computes with one thread, so the cores run several side by side.
test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# The sanitized library is built in a separate folder. Python itself leaks on purpose, so leak detection is off.
SANITIZED := build/sanitized
SANITIZED_TESTS := cpu_attention cpu_elementwise cpu_matmul cpu_solver lm_head malicious_files step_graph
sanitize: $(READY)
	GPTQ_BELLE_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 GPTQ_BELLE_CPU_LIBRARY=$(CURDIR)/$(SANITIZED)/gptq_belle/kernels/_native.so \
	  $(BIN)/python -m pytest $(addprefix tests/test_,$(addsuffix .py,$(SANITIZED_TESTS)))

interop: $(READY)
	GPTQ_BELLE_RECORD=$(CURDIR)/benchmarks/results/interop.json $(BIN)/python -m pytest -m slow tests/test_interop.py -rs

clients: $(READY)
	$(BIN)/python -m pytest -m 'slow or not slow' tests/test_clients.py -rs

# A file that was removed from the sources would come into the wheel from an earlier build.
wheel: $(BIN)/python
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean:
	rm -f kernels/_native*.so
	rm -rf $(VENV) build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(READY): pyproject.toml constraints.txt setup.py $(wildcard kernels/native/*) | $(BIN)/python
	@echo "Installing into $(VENV). This downloads what pip has not cached: torch (2.6 GB with the CUDA libraries, 0.2 GB"
	@echo "for CPUs only), then 0.4 GB of other packages."
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[dev,plot]'
	@ls kernels/_native*.so >/dev/null 2>&1 || \
	  echo "The CPU kernels are not built: there is no C++17 compiler. torch computes instead, more slowly." >&2
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "gptq_belle needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install a newer one and name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "The environment could not be made. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
