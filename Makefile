# make install      what training needs, into .venv
# make quickstart   the first hour: environment, demo clips, train a LoRA, verify, sample
# make test         the fast test suite (no network, no GPU)
# make test-old-cpu what compares numbers, as a processor without AVX computes them
# make soak         the slow half: hundreds of kills, a thousand corruptions, ten minutes of fuzzing (docs/reliability.md)
# make lint         ruff and mypy --strict
# make size         code lines per folder, and how many files four walks through the package touch
# make docs         regenerate what is generated (docs/config.md, configs/, docs/memory.md, notebooks/)
# make bench-memory predicted peaks of the shipped configurations against their goals; docs/memory.md
# make bench        what a step does, counted, and processor seconds of a step and of what is around it, into build/
# make site         the documentation as a site, in build/site
# make test-gpu     what needs a CUDA device
# make bench-gpu    every memory recipe at full size on a CUDA device: measured peak against predicted, s/step
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of tests: one for each core, 2 to 4.
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores < 2 ? 2 : cores > 4 ? 4 : cores)))

# Tiny models gain nothing from threads, and two pytest workers with two threads each contend for two cores.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Where it is set, as in many an image, every process of a test or a quickstart would compile what it imports again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install develop quickstart test test-old-cpu soak test-gpu bench bench-gpu bench-memory size lint format docs site clean

install: $(VENV)/.installed

# What works on the package itself needs more than its users do: pytest, ruff, mypy, build.
develop: $(VENV)/.developing

# pip is kept to errors: its warnings about editable installs are no news to anyone. It compiles no library: of 15 000
# files the commands import 4 700, which the last line compiles; the others are compiled where they are imported.
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV); this takes a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --quiet --no-compile --constraint constraints.txt --editable .
	@HF_HUB_OFFLINE=1 $(BIN)/python -c 'from diffusers import CogVideoXPipeline; from transformers import T5EncoderModel; \
	  import av, bitsandbytes, datasets, tensorboard, finetune.runs, finetune.trainers.setup, finetune.planner.plan' 2> /dev/null || true
	@touch $@

$(VENV)/.developing: $(VENV)/.installed
	@echo "adding development tools"
	$(BIN)/python -m pip install --quiet --quiet --no-compile --constraint constraints.txt --editable ".[dev]"
	@touch $@

quickstart: install
	$(BIN)/finetune quickstart

test: develop
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# The arithmetic again as a processor without AVX does it: other kernels, other last digits.
OLD_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
ARITHMETIC := golden train parallel distributed export faults

test-old-cpu: develop
	$(TEST_ENV) $(OLD_CPU) $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m arithmetic $(ARITHMETIC:%=tests/test_%.py)

# SOAK_KILLS=10 SOAK_FUZZ_SECONDS=30 make soak: the same in a few minutes.
soak: develop
	$(TEST_ENV) PYTHONPATH=tests $(BIN)/python -m soak

# ONLY=5b make test-gpu: a piece that fits ten minutes; benchmarks/README.md has them.
test-gpu: develop
	$(BIN)/python -m pytest -m gpu -s $(if $(ONLY),--only '$(ONLY)')

bench-gpu: develop
	$(BIN)/python benchmarks/gpu.py $(if $(ONLY),--only '$(ONLY)')

# On a CPU, half an hour of one core. With --before ANOTHER_CHECKOUT, processor.py runs both in turn.
bench: develop
	mkdir -p build
	$(BIN)/python benchmarks/work.py --output build/work.json
	$(BIN)/python benchmarks/example_step.py --output build/example_step.json
	$(BIN)/python benchmarks/processor.py --rounds 1 --output build/processor.json

bench-memory: develop
	$(BIN)/python benchmarks/memory.py; code=$$?; $(BIN)/python scripts/make_memory.py && $(BIN)/python scripts/make_cards.py && $(BIN)/python scripts/draw_memory.py && $(BIN)/python scripts/make_configs.py && exit $$code

lint: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

size: develop
	$(TEST_ENV) $(BIN)/python scripts/sizes.py

format: develop
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: develop
	$(BIN)/python scripts/make_config_docs.py
	$(BIN)/python scripts/make_configs.py
	$(BIN)/python scripts/make_memory.py
	$(BIN)/python scripts/make_cards.py
	$(BIN)/python scripts/draw_memory.py
	$(BIN)/python scripts/make_notebooks.py
	$(BIN)/python scripts/draw_layers.py
	$(BIN)/python scripts/sizes.py --write

site: develop
	$(BIN)/python scripts/make_site.py

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
