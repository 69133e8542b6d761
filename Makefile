# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Python 3.11 or later, make and git are all they need.
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
RUNS := runs/demo
# empty takes the newest versions of everything, see CONTRIBUTING.md
CONSTRAINTS := -c constraints.txt
# the quickest way to install is also the one that does not byte-compile what is never imported
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(CONSTRAINTS)
# what is imported is compiled once, not by every process: it halves the time of every command
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-dev demo test check docs lint unit smoke wheel bench clean

help:
	@echo "make demo   train, attack and report RED on the embedded digits (under 4 minutes)"
	@echo "make test   format, lint, types, tests and one end-to-end run"
	@echo "make docs   build/docs/index.html and the leaderboard, every warning an error"
	@echo "make wheel  build the wheel, and use it where the clone cannot be seen"
	@echo "make lint   mend what ruff can mend"
	@echo "make clean  remove the environment and the demo's runs"

setup: $(VENV)/.installed
setup-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)"
	$(PIP) -e ".[report]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[report,parquet,onnx,serve,docs,dev]"
	$(PIP) --no-deps torchattacks==3.5.1 adv-lib==0.2.8
	@touch $@

# one thread: its networks are so small that a second one gains nothing, and waits where a core is busy
demo: export OMP_NUM_THREADS = 1
demo: setup
	@for method in vanilla red; do \
	  echo "demo: training digits-$$method"; \
	  $(BIN)/redefense train digits-$$method --out $(RUNS)/digits-$$method --resume && \
	  echo "demo: attacking digits-$$method" && \
	  $(BIN)/redefense evaluate $(RUNS)/digits-$$method --suite quick || exit 1; \
	done
	@echo "demo: writing the report"
	@$(BIN)/redefense report $(RUNS)/digits-vanilla $(RUNS)/digits-red --out $(RUNS)/report.html

# each of the first four keeps one core busy, the tests both
test:
	@$(MAKE) --no-print-directory -j2 check docs smoke wheel
	@$(MAKE) --no-print-directory unit

check: setup-dev
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/mypy

docs: setup-dev
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	$(BIN)/redefense leaderboard claims --out build/docs/leaderboard --quiet

unit: setup-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

smoke: setup-dev
	sh tests/smoke.sh $(BIN)

wheel: setup-dev
	sh tests/wheel.sh $(BIN)

lint: setup-dev
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) $(RUNS)
