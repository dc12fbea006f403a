PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
DEEPSPEED := .deepspeed
DEMO := .venv-demo
CORES := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
TEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Tests that run with the lowest supported versions: trainer, maths, caches, data and metrics.
OLDEST_TESTS := tests/trainer/test_trainer.py tests/trainer/test_text.py tests/trainer/test_checkpoints.py \
	tests/trainer/test_evaluation.py tests/trainer/test_resume.py tests/loss/test_divergence.py \
	tests/loss/test_extremes.py tests/sampling/test_sampler.py tests/cache tests/data tests/metrics \
	tests/distributed/test_ddp.py

# Folder of the page and the records of bench-accelerator.
OUT ?= bench-accelerator

.PHONY: demo bench-accelerator test test-slow chromium test-oldest test-deepspeed test-all lint docs docs-serve clean

## Distil a 3,375-class glyph recogniser by five methods, offline: table and plots in runs/glyphs/
demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(CORES) examples/run_glyphs.py --output_dir runs/glyphs

## Time the steps on the accelerator of this machine in at most 8 minutes: accelerator.md and JSON lines in OUT
bench-accelerator: $(VENV)/.installed
	$(BIN)/python benchmarks/accelerator.py --output_dir $(OUT)

test: $(VENV)/.installed
	$(TEST) -m "not slow"

test-slow: $(VENV)/.installed $(DEMO)/.installed chromium
	$(TEST) -m slow

## Install Debian's Chromium for the tests of pages, if there is none; without root those tests are skipped
chromium:
	command -v chromium >/dev/null || test "$$(id -u)" != 0 || (apt-get update -qq && apt-get install -qq -y chromium)

## The fast tests of the trainer with the lowest versions that setup.cfg allows
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" \
		-k "not row_sparse" $(OLDEST_TESTS)

## ZeRO-2 and ZeRO-3 on CPU. Kept apart, since accelerate loads DeepSpeed wherever it is installed; it needs a C++ compiler
test-deepspeed: $(VENV)/.installed $(DEEPSPEED)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/$(DEEPSPEED) PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" \
		$(BIN)/python -m pytest tests/distributed/test_deepspeed.py

test-all: test test-slow test-oldest test-deepspeed

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tools/plain_english.py

## Build the documentation site in site/; broken links, anchors and references fail
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

## Show the documentation site on http://127.0.0.1:8000 while it is written
docs-serve: $(VENV)/.installed
	$(BIN)/mkdocs serve

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "hf_dis needs Python 3.10 or newer, found " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(OLDEST)/.installed: setup.cfg tests/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $$($(PYTHON) tests/oldest.py) pytest pytest-xdist hypothesis
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(DEEPSPEED)/.installed: Makefile $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(DEEPSPEED) deepspeed==0.19.8
	$(BIN)/python -m pip install --quiet --upgrade --target $(DEEPSPEED) einops hjson msgpack ninja py-cpuinfo pydantic
	touch $@

## Gradio for demo/, and Trackio, which needs Gradio; apart since gradio 6.31 takes no Pillow 13; all else comes from the other environment
$(DEMO)/.installed: setup.cfg Makefile $(VENV)/.installed
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/python -m pip install --quiet "gradio>=6.31" trackio
	$(DEMO)/bin/python -c 'import sys, sysconfig; open(sysconfig.get_path("purelib") + "/hf_dis.pth", "w").write(sys.argv[1])' \
		"import site; site.addsitedir('$$($(BIN)/python -c 'import os, sysconfig; print(os.path.abspath(sysconfig.get_path("purelib")))')')"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(DEEPSPEED) $(DEMO) runs site *.egg-info
