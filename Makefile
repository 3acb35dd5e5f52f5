# Two commands are all a fresh machine needs: `make demo` and `make test`. Both install into .venv once.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PATHS := hcompress export tests benchmarks

.PHONY: demo test test-all lint bench gpu-check clean
.PHONY: zoo-fashion-dit zoo-fashion-uvit zoo-fashion-classifier zoo-emoji-pixart zoo-emoji-clip
.DEFAULT_GOAL := test

# torch-fidelity without torchvision, which it asks for and hcompress does not use: a CUDA build of it beside a CPU torch
# breaks transformers.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "hcompress needs Python 3.11 to 3.13; say PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || { echo "creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing hcompress and what it needs into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[train,cpu,trt-rtx,prune,dev]'
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-deps torch-fidelity
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m hcompress.demo

# A process for each core, each with one thread; a file's tests stay together, for what they share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: $(INSTALLED)
	@$(PYTEST) -m "not slow"

test-all: $(INSTALLED)
	@$(PYTEST)

lint: $(INSTALLED)
	@$(BIN)/ruff format --check $(PATHS)
	@$(BIN)/ruff check $(PATHS)
	@$(BIN)/mypy

bench: $(INSTALLED)  # after `make demo`
	@$(BIN)/hcompress bench out/demo/bundle

# Installs nothing: on a CUDA machine without a package index it takes the Python at hand and skips what is missing.
gpu-check:
	@PYTHONPATH=.:export$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) benchmarks/gpu_check.py

zoo-fashion-dit: $(INSTALLED)
	@$(BIN)/python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit
	@$(BIN)/python -m hcompress.zoo.train_fashion_dit --run runs/fashion-dit --store

zoo-fashion-uvit: $(INSTALLED)
	@$(BIN)/python -m hcompress.zoo.train_fashion_uvit --run runs/fashion-uvit
	@$(BIN)/python -m hcompress.zoo.train_fashion_uvit --run runs/fashion-uvit --store

zoo-fashion-classifier: $(INSTALLED)
	@$(BIN)/python -m hcompress.zoo.train_fashion_classifier

zoo-emoji-pixart: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[zoo]'
	@$(BIN)/hcompress zoo fetch-data emoji minilm
	@$(BIN)/python -m hcompress.zoo.train_emoji_pixart --run runs/emoji-pixart
	@$(BIN)/python -m hcompress.zoo.train_emoji_pixart --run runs/emoji-pixart --store

zoo-emoji-clip: $(INSTALLED)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[zoo]'
	@$(BIN)/hcompress zoo fetch-data emoji minilm
	@$(BIN)/python -m hcompress.zoo.train_emoji_clip

clean:
	rm -rf .venv out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
