# make demo: a gallery from real photos, from nothing. make test: everything CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types unit browser bench clean

demo: $(STAMP)
	$(BIN)/python -m jobs.demo build/demo

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP) browser
	$(BIN)/python -m pytest

# The tests of the HTML report want a Chromium. Where there is none and it cannot be had, they skip and say so.
browser:
	@if ! command -v chromium >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(timeout 120 apt-get update && timeout 300 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 \
			|| echo "no Chromium: the tests of the report in a browser will skip"; \
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
