# make demo: build a gallery from real photos, from nothing. make test: check everything that needs no other data.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

SHARED ?= ../shared

.PHONY: demo test test-shared lint types unit browser bench clean

demo: $(STAMP)
	$(BIN)/python -m jobs.demo build/demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) browser
	$(BIN)/python -m pytest -m "not shared"

# These need photos and weights that we may not ship. They skip if SHARED is not a folder of them.
test-shared: $(STAMP)
	$(BIN)/python -m pytest -m shared --shared=$(SHARED)

# The tests of the HTML report need Chromium. They skip if it cannot be installed.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 \
			|| echo "Chromium is not installed: the tests of the HTML report will skip"; \
	fi

bench: $(STAMP)
	$(BIN)/python tests/bench/throughput.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cpu,s3,report,dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build
