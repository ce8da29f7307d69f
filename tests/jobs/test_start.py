"""The script answers an interruption from its first moment on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

_SLOW_IMPORT = """
import importlib.abc, sys, time

class Waits(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Waits())
"""


def test_an_interruption_during_the_imports_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_SLOW_IMPORT)
    process = subprocess.Popen(
        [sys.executable, "-c", "from jobs.start import main; main()"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors == ""


def test_the_script_runs_commands() -> None:
    command = [sys.executable, "-c", "from jobs.start import main; main()", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=True)
    assert done.stdout.startswith("facepipe ")
