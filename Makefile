# Each target sets up what it needs in .venv; all it takes is make and a Python of 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
# Otherwise pyright asks the network for a newer version of itself.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# For each target of make fuzz.
FUZZ_SECONDS ?= 600
# Processes that run the tests, each with files of its own.
WORKERS ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

.PHONY: help demo test test-all test-oldest chaos fuzz lint ruff clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      train the small demo twice, em beside InfoNCE (OpenMoji pictures, 7 minutes on two CPU cores), and write its report"
	@echo "make test      ruff, pyright and pytest, in minutes; WORKERS=4 tests at a time (default: one for each core)"
	@echo "make test-all  the same with all tests: every architecture of open_clip to ONNX, models of real size"
	@echo "make chaos     kills, signals, damage, full disks, bad servers, again and again (20 minutes), into docs/reliability.md"
	@echo "make fuzz      files that are nearly right, 10 minutes for each kind; FUZZ_SECONDS=60 for less"
	@echo "make test-oldest  pytest with the oldest versions that pyproject.toml allows"
	@echo "make lint      ruff and pyright"
	@echo "make clean     remove .venv, .venv-oldest, caches and build output; data/ and runs/ stay"
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made with."

demo: .venv/.installed-demo
	@test -f data/openmoji/train/manifest.json -a -f data/openmoji/val/manifest.json || $(BIN)/vlcl data openmoji data/openmoji
	@$(BIN)/vlcl train configs/openmoji.yaml train.overwrite=true
	@echo
	@echo "The same with InfoNCE, as CLIP and open_clip have it:"
	@$(BIN)/vlcl train configs/openmoji.yaml loss.name=infonce train.output=runs/openmoji-infonce train.overwrite=true
	@echo
	@$(BIN)/python examples/side_by_side.py runs/openmoji runs/openmoji-infonce
	@echo "Of 395 pairs, one seed, 5 epochs: a difference of two points is noise. More seeds and batches: docs/evidence.md"
	@echo
	@echo "Done. The report with curves and retrieval examples: runs/openmoji/report.html"

test-all: export VLCL_TEST_EVERYTHING := 1
test-all: TIMEOUT := --timeout 1800 --override-ini faulthandler_timeout=1830
test test-all: ruff
	@types=$$(mktemp) || exit 1; \
	$(BIN)/pyright >"$$types" 2>&1 & checker=$$!; \
	trap 'kill $$checker 2>/dev/null; rm -f "$$types"' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(TIMEOUT); tests=$$?; \
	wait $$checker; check=$$?; \
	echo "pyright:"; cat "$$types"; \
	exit $$((tests ? tests : check))

# What was stopped goes on: a line a try in runs/chaos/results.jsonl.
chaos: .venv/.installed-dev
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true PYTHONPATH=tests $(BIN)/python -m chaos --write

fuzz: .venv/.installed-dev
	@VLCL_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/pytest --numprocesses $(WORKERS) --timeout $$(($(FUZZ_SECONDS) + 300)) \
		--override-ini faulthandler_timeout=0 tests/test_fuzz.py tests/test_fuzz_folders.py

test-oldest: .venv-oldest/.installed
	@.venv-oldest/bin/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: ruff
	@$(BIN)/pyright

ruff: .venv/.installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

clean:
	@rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is done again.
.venv/.installed-%: .venv/bin/python pyproject.toml setup.py
	@echo "Installing vlcl[$*] into .venv (torch is large: minutes the first time, seconds later)"
	@$(BIN)/python -m pip install --editable '.[$*]'
	@touch $@

# uv is faster than pip at this, and says which package forbids a bound. Without ONNX, whose extra has bounds of its own.
.venv-oldest/.installed: pyproject.toml setup.py tests/oldest.py
	@echo "Installing vlcl[test] into .venv-oldest, each package at the bound of pyproject.toml"
	@python3.11 -m venv .venv-oldest
	@.venv-oldest/bin/python -m pip install --quiet uv
	@.venv-oldest/bin/python tests/oldest.py test >.venv-oldest/constraints.txt
	@.venv-oldest/bin/uv pip install --python .venv-oldest/bin/python --constraints .venv-oldest/constraints.txt --editable '.[test]'
	@touch $@

.venv/bin/python:
	@for python in "$(PYTHON)" python3.13 python3.12 python3.11; do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making .venv with $$("$$python" --version)"; \
			"$$python" -m venv .venv || { rm -rf .venv; \
				echo "error: $$python cannot make a virtual environment (Debian: apt install python3-venv)" >&2; exit 1; }; \
			exit 0; \
		fi; \
	done; \
	echo "error: vlcl needs Python 3.11 or newer; '$(PYTHON)' is not. Type: make PYTHON=/path/to/python3.12 TARGET" >&2; exit 1
