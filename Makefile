# Everything is installed into .venv; choose other versions with, say, make test TORCH=torch==2.9.1 TORCHVISION=torchvision==0.24.1
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TRITON ?= triton==3.7.1
MINKOWSKI ?= MinkowskiEngine==0.5.4
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := pyproject.toml setup.py kernels/constants.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

SANITIZED := baseline native $(if $(filter x86_64,$(shell uname -m)),avx2)

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sparse-fcmae

.PHONY: demo test test-slow test-faults test-gpu gpu test-sanitize bench minkowski docs lint wheel clean

demo: .venv/installed  ## draw images, pretrain on them, show what was learnt
	$(BIN)/sparse-fcmae demo --out runs/demo --overwrite

# two processes, whose threads must not wait by spinning on each other's cores
test: lint  ## all tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/installed-for-tests  ## what takes minutes, one after the other
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow

test-faults: .venv/installed-for-tests  ## runs that are killed, starved of disk, robbed of processes; as root for small disks
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -m slow tests/faults

test-gpu: .venv/installed-for-tests  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

# by the environment here or else, as there may be neither network nor pip, by a Python that has torch; the kernels for CPUs
# are not compiled then
GPU_PYTHON = $(if $(or $(findstring command,$(origin PYTHON)),$(if $(wildcard .venv/installed),,1)),$(or $(abspath $(shell command -v $(PYTHON))),$(PYTHON)),$(CURDIR)/$(BIN)/python)
gpu: build/source  ## runs/gpu/summary.md: all there is to measure on a GPU, in 9 minutes; once more for the next parts
	$(if $(DATA),data="$$(realpath '$(DATA)')" && )cd build/source && $(GPU_PYTHON) \
		-m sparse_fcmae bench gpu \
		--out '$(CURDIR)/runs/gpu' $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DATA),--data "$$data")

# the package as it is installed: folders that lie beside it in a checkout are in it
build/source: FORCE
	@mkdir -p $@/sparse_fcmae
	@ln -sfn $(filter-out %__pycache__,$(wildcard $(CURDIR)/sparse_fcmae/*)) $(CURDIR)/kernels $(CURDIR)/benchmarks $@/sparse_fcmae/

FORCE:

test-sanitize: $(SANITIZED:%=build/sanitize-%)  ## the C++ kernels under address and undefined-behaviour sanitizers
	set -e; for program in $^; do $$program; done

build/sanitize-native: FLAGS := -march=native
build/sanitize-avx2: FLAGS := -mavx2 -mfma
build/sanitize-%: tests/kernels/sanitize.cpp $(SOURCES)
	mkdir -p build
	$(CXX) -std=c++20 -O1 -g -Wall -Wextra -Wno-psabi -fopenmp -fsanitize=address,undefined \
		-fno-sanitize-recover=all $(FLAGS) $(shell $(PYTHON) kernels/constants.py) kernels/cpu/*.cpp $< -o $@

bench: .venv/installed  ## runs/bench/report.html: the suite on this machine; with DATA=folder, loading those images too
	-$(MAKE) minkowski
	$(BIN)/sparse-fcmae bench report --out runs/bench --overwrite $(if $(DATA),--data '$(DATA)')

minkowski: .venv/minkowski  ## the peer that sparse convolution is measured against; needs OpenBLAS and its headers

docs: .venv/installed-for-tests  ## build/site/index.html: the documentation as a site
	$(BIN)/python docs/assemble.py
	$(BIN)/zensical build --strict

lint: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md docs sparse_fcmae kernels benchmarks examples

wheel: .venv/installed  ## dist/*.whl
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist *.egg-info kernels/cpu/*.so

# torch comes first and by itself, so that nothing else decides on its version
.venv/torch:
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(PIP) install --editable '.[finetune,jpeg,plots]'
	touch $@

# it has all of .venv/installed, and does not need it first: each of the two compiles the kernels, for two minutes
.venv/installed-for-tests: .venv/torch $(SOURCES)
	$(PIP) install $(TORCH) $(TORCHVISION) --editable '.[test]'
	# where torch has not brought its own: the GPU's kernels are tested without a GPU too
	@if [ $$(uname) = Linux ] && ! $(BIN)/python -c 'import triton' 2>/dev/null; then $(PIP) install $(TRITON); fi
	touch .venv/installed $@

# its setup.py imports torch, calls whatever pip it finds and is too old for setuptools 80; what it builds serves the torch
# that it was built with alone, so it is kept apart for each; without symbols for a debugger it is built in two thirds of the time
.venv/minkowski: .venv/installed
	set -e; wheels="$(CACHE)/$$($(BIN)/python -c 'import torch; print("torch-" + torch.__version__)')"; \
	get="env PIP_FIND_LINKS= $(PIP) install --force-reinstall --no-index --find-links $$wheels --no-deps $(MINKOWSKI)"; \
	$$get 2>/dev/null || { \
		echo 'building $(MINKOWSKI): some minutes'; \
		$(PIP) install 'setuptools>=77,<80' wheel ninja numpy; \
		export PATH="$(CURDIR)/$(BIN):$$PATH" MAX_JOBS="$$(nproc)"; \
		export CFLAGS="$$(python -c 'import sysconfig; print(sysconfig.get_config_var("CFLAGS"))') -g0"; \
		$(PIP) wheel --no-cache-dir --use-pep517 --no-build-isolation --no-deps \
			--config-settings=--build-option=--cpu_only --config-settings=--build-option=--blas=openblas \
			--wheel-dir "$$wheels" $(MINKOWSKI); \
		$$get; }
	touch $@
