"""Small functions of the tests."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from typer.testing import CliRunner

from facepipe.config import build
from facepipe.gallery import Gallery
from jobs.cli import app
from pipelines.embed import EmbedConfig, EmbedSummary, run

Result = TypeVar("Result")


def measure_peak_bytes(work: Callable[[], Result]) -> tuple[Result, int]:
    """Run `work` and return its result and the most memory that Python and NumPy held meanwhile, in bytes.

    Use this where a test would otherwise look at the clock: arrays of all pairs or copies of large images show here, and
    a busy machine does not.
    """
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def trials(full: int) -> range:
    """Trials of a test with an element of chance: all of them where FACEPIPE_ALL_TRIALS is set, else a quarter.

    Every trial is seeded by its number, so a run of all covers what a short one does.
    """
    return range(full if os.environ.get("FACEPIPE_ALL_TRIALS") else max(3, full // 4))


def embed(source: str | Path, gallery: str | Path, *layers: dict[str, Any], **run_settings: Any) -> EmbedSummary:
    """Embed with settings."""
    config = build(EmbedConfig, *layers, {"source": {"uri": str(source)}, "run": run_settings})
    return run(config, str(gallery))


def rows(gallery: str | Path, without: tuple[str, ...] = ("ingested_at",)) -> list[dict[str, Any]]:
    """All rows, in an order that does not depend on how they came in."""
    table = Gallery(str(gallery)).to_arrow().drop_columns(list(without))
    return sorted(table.to_pylist(), key=lambda row: (row["uri"], row["face_index"] or 0))


def same_faces(a: list[dict[str, Any]], b: list[dict[str, Any]], tolerance: float = 1e-5) -> None:
    """Assert that two galleries' rows hold the same images and faces, whatever they are called."""

    def key(row: dict[str, Any]) -> tuple[str, int]:
        return row["image_id"] or "", row["face_index"] if row["face_index"] is not None else -1

    a, b = sorted(a, key=key), sorted(b, key=key)
    assert [key(row) for row in a] == [key(row) for row in b]
    for left, right in zip(a, b, strict=True):
        assert left["status"] == right["status"]
        if left["embedding"] is not None:
            assert np.abs(np.subtract(left["embedding"], right["embedding"])).max() <= tolerance
            assert np.abs(np.subtract(left["box"], right["box"])).max() <= 1e-2


def run_facepipe(*words: str | Path) -> tuple[int, str, str]:
    """Run a `facepipe` command in this process.

    Args:
        words: the words of the command line after `facepipe`.

    Returns:
        Its exit code, its stdout, and its stderr as one line.
    """
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, " ".join(result.stderr.split())


def fail_to_list(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Have every listing of one folder fail, as it does on a share that does not answer."""
    for name in ("scandir", "listdir"):
        real: Callable[..., Any] = getattr(os, name)

        def fail(path: Any = ".", real: Callable[..., Any] = real) -> Any:
            if not isinstance(path, int) and os.fsdecode(path).rstrip("/") == str(folder):
                raise OSError(number, os.strerror(number), str(folder))
            return real(path)

        monkeypatch.setattr(os, name, fail)
