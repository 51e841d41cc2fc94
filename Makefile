# The targets create .venv and install what they need, once.
#   make demo    train top-AFA beside TopK and BatchTopK on the embedded language model
#   make test    the tests and every example in the docs
#   make lint types    what CI checks besides
#   make docs    the documentation as a site in site/, without a network; broken links are errors
#   make performance   the measurements that docs/performance.md shows (about half an hour, Linux)
#   make tutorials     execute the tutorials and check what they show (some minutes)
#   make notebooks     execute them and store their outputs in them
#   make bench   the comparison on SmolLM2 that docs/results.md shows (about half an hour)
# Another set of versions: make CONSTRAINTS=/dev/null TORCH=torch
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: install demo test tutorials notebooks lint types format docs performance bench
install: $(INSTALLED)

# torch by itself first: which build it is, CPU or CUDA, is decided by what this line finds
$(INSTALLED): pyproject.toml $(wildcard constraints.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
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
