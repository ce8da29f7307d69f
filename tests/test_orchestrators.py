"""The examples for Airflow and Dagster run a night, each in the environment that `make test-orchestrators` makes."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from facepipe.gallery import Gallery

PYTHON = REPOSITORY / "build" / "orchestrators" / "bin" / "python"
EXAMPLES = {
    "run_airflow.py": REPOSITORY / "infra" / "airflow" / "facepipe_nightly.py",
    "run_dagster.py": REPOSITORY / "infra" / "dagster" / "facepipe_nightly.py",
}


def run_example(script: str, config: Path, folder: Path) -> dict[str, Any]:
    """Run an example on a config, and return what it reports."""
    if not PYTHON.is_file():
        pytest.skip("needs Airflow and Dagster: make test-orchestrators")
    command = folder / "facepipe"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={REPOSITORY} exec {sys.executable} -m jobs.cli "$@"\n')
    command.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"FACEPIPE": str(command), "FACEPIPE_CONFIG": str(config), "AIRFLOW_HOME": str(folder / "airflow")}
    environment["DAGSTER_HOME"] = ""
    words = [PYTHON, REPOSITORY / "tests" / "infra" / script, EXAMPLES[script]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def config(drawings: Path, tmp_path: Path) -> Path:
    path = tmp_path / "nightly.toml"
    path.write_text(
        f'gallery = "g"\n[[source]]\nuri = "{drawings}"\n[detect]\nmodel = "fake-detector"\n'
        '[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    )
    return path


def test_airflow_runs_a_night(config: Path, tmp_path: Path) -> None:
    report = run_example("run_airflow.py", config, tmp_path)
    assert report == {
        "dag": "facepipe_nightly",
        "schedule": "15 2 * * *",
        "max_active_runs": 1,
        "retries": 3,
        "end": "done",
    }
    assert Gallery(tmp_path / "g").counts()["images"] == 60


def test_airflow_does_not_repeat_a_mistake(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + "[nonsense]\n")
    assert run_example("run_airflow.py", config, tmp_path)["end"].startswith("failed for good: facepipe ended with 2")
    config.write_text('gallery = "g"\n[[source]]\nuri = "gone"\n')
    assert run_example("run_airflow.py", config, tmp_path)["end"] == "to be tried again: CalledProcessError"


def test_dagster_runs_a_night(config: Path, tmp_path: Path) -> None:
    report = run_example("run_dagster.py", config, tmp_path)
    assert (report["schedules"], report["success"]) == (["15 2 * * *"], True)
    assert report["metadata"]["images"] == 60
    assert Gallery(tmp_path / "g").counts()["images"] == 60


def test_dagster_does_not_repeat_a_mistake(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + "[nonsense]\n")
    report = run_example("run_dagster.py", config, tmp_path)
    assert (report["success"], report["retried"]) == (False, False)


@pytest.mark.parametrize("path", EXAMPLES.values(), ids=lambda path: path.parent.name)
def test_examples_are_code(path: Path) -> None:
    """Without Airflow and Dagster at hand."""
    ast.parse(path.read_text())
