# Everything runs in a virtual environment of its own, made on first use.
#   make PYTHON=python3.12 …     another interpreter (3.11 or later)
#   make VENV=/path …            another place for the environment
PYTHON ?= python3
VENV ?= .venv
CORPUS ?= corpus
RUN ?= runs/tiny
HOURS ?= 24
CONFIG ?= tiny
DEVICE ?= cpu
MINUTES ?=

BIN := $(VENV)/bin
MUSICLM := $(BIN)/musiclm
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
SOURCES := constraints.txt pyproject.toml setup.py

.PHONY: help demo listen test bench budgets train-tiny eval clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/plot.stamp  ## Ten seconds of organ from the bundled model: hymn.wav, hymn.png.
	$(MUSICLM) generate "a slow hymn on a church organ in G minor" \
		--seconds 10 --num-samples 4 --out hymn.wav --spectrogram

listen: $(VENV)/plot.stamp  ## The page of clips anew, from the bundled model: docs/listen.md.
	$(BIN)/python docs/listen/make.py

test: $(VENV)/test.stamp  ## Lint, formatting, types, tests: what CI runs.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(VENV)/bench.stamp  ## Every operation beside its peers: what this machine can run.
	$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-sort=mean
	$(BIN)/python -m benchmarks.decode_step

budgets: $(VENV)/test.stamp  ## What the kernels compile to, beside the committed budget. No GPU needed.
	$(BIN)/python -m benchmarks.offline

# Cut short, the same command goes on where it was. On an H100: docs/training.md.
train-tiny: $(CORPUS)/manifest.jsonl $(VENV)/train.stamp  ## Train the bundled model anew (hours).
	$(MUSICLM) train all --config $(CONFIG) --manifest $(CORPUS)/manifest.jsonl --run-dir $(RUN) \
		--device $(DEVICE) $(if $(MINUTES),--minutes $(MINUTES))
	$(MUSICLM) bundle engine/musiclm_engine/assets --run-dir $(RUN) --config $(CONFIG) --dtype int8

eval: $(CORPUS)/manifest.jsonl $(VENV)/judges.stamp  ## Judge the bundled model on held-out pieces.
	$(MUSICLM) eval --manifest $(CORPUS)/manifest.jsonl --out eval.json --calibrate

clean:  ## Remove the environment and all caches; corpus, runs and audio stay.
	rm -rf $(VENV) build dist engine/*.egg-info kernels/*.egg-info *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find engine kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The manifest is written last, so a corpus cut short is not taken for a whole one.
$(CORPUS)/manifest.jsonl: | $(VENV)/render.stamp
	$(MUSICLM) data build $(CORPUS) --hours $(HOURS)

# Packages: X.stamp stands for `pip install -e ".[X]"`, unless a rule below says otherwise.
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: $(SOURCES) | $(BIN)/pip
	@echo "Installing into $(VENV): some minutes the first time."
	$(INSTALL) -e ".[$*]"
	@touch $@

# --no-deps: see the extras in pyproject.toml.
$(VENV)/render.stamp: $(VENV)/data.stamp
	$(INSTALL) --no-deps tinysoundfont
	@touch $@

$(VENV)/judges.stamp: $(VENV)/eval.stamp
	$(INSTALL) --no-deps basic-pitch musicnn
	@touch $@

# --no-deps: see benchmarks/peers.py; of open_clip one file is read, which needs torch alone.
$(VENV)/bench.stamp: $(SOURCES) | $(BIN)/pip
	@echo "Installing into $(VENV): some minutes the first time."
	$(INSTALL) -e ".[dev,bench,vq,hf]"
	$(INSTALL) --no-deps musiclm-pytorch audiolm-pytorch hyper-connections beartype open_clip_torch
	@touch $@

# All of it, so that no test is skipped for want of a package.
$(VENV)/test.stamp: $(SOURCES) | $(BIN)/pip
	@echo "Installing into $(VENV): some minutes the first time."
	$(INSTALL) -e ".[dev,train,data,eval,plot,bench,vq]"
	$(INSTALL) --no-deps tinysoundfont basic-pitch musicnn
	$(INSTALL) --no-deps audiolm-pytorch hyper-connections beartype
	@touch $@
