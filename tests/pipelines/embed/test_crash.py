"""SIGKILL at random moments: after a second run the gallery equals an undisturbed one, row for row."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
from conftest import draw
from helpers import embed, rows, trials

from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery

pytestmark = pytest.mark.slow

TRIALS = trials(12)
_SETTINGS = [
    *("--set", "detect.model=fake-detector", "--set", "embed.model=fake-embedder", "--set", "run.block_smallest=4"),
    *("--set", "run.block_largest=8", "--set", "run.commit_seconds=0.05", "--workers", "2", "--quiet"),
]

_FAKES = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 images, a few of them broken."""
    root = tmp_path_factory.mktemp("corpus")
    for n in range(300):
        data = cv2.imencode(".png", cv2.resize(draw(n), (480, 480), interpolation=cv2.INTER_NEAREST))[1].tobytes()
        (root / f"{n:04d}.png").write_bytes(data[: len(data) // 2] if n % 50 == 7 else data)
    return root


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, object]], float]:
    """(rows, seconds) of a run that nothing happened to."""
    gallery = tmp_path_factory.mktemp("undisturbed") / "g"
    began = time.monotonic()
    assert start(corpus, gallery, "local").wait() == 0
    return rows(gallery), time.monotonic() - began


def start(corpus: Path, gallery: Path, runner: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jobs.cli", "embed", str(corpus), str(gallery), "--runner", runner, *_SETTINGS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers(driver: int, name: str) -> list[psutil.Process]:
    try:
        found = psutil.Process(driver).children(recursive=True)
        return [p for p in found if name in " ".join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("trial", TRIALS)
def test_kill_local(
    trial: int, corpus: Path, undisturbed: tuple[list[dict[str, object]], float], tmp_path: Path
) -> None:
    expected, seconds = undisturbed
    rng = random.Random(trial)
    gallery = tmp_path / "g"
    driver = start(corpus, gallery, "local")
    time.sleep(rng.uniform(0.35, 1.0) * seconds)
    if trial % 2:
        driver.kill()
    else:
        for victim in rng.sample(alive := workers(driver.pid, "pipelines.runtime.runners.child"), min(1, len(alive))):
            os.kill(victim.pid, signal.SIGKILL)
    code = driver.wait(60)
    assert code == (-signal.SIGKILL if trial % 2 and code else 0)
    if trial % 2 and Gallery.exists(str(gallery)):
        before = rows(gallery)
        assert not {(r["uri"], r["face_index"]) for r in before} - {(r["uri"], r["face_index"]) for r in expected}
    embed(corpus, gallery, _FAKES, runner="inline")
    assert rows(gallery) == expected
    assert verify_gallery(Gallery(str(gallery))).problems == []


def wait_for_first_part(driver: subprocess.Popen[bytes], gallery: Path) -> None:
    """Wait until a worker has written a part, or the run has ended."""
    while driver.poll() is None and not list((gallery / "faces").glob("*.parquet")):
        time.sleep(0.02)


def kill_ray_worker(corpus: Path, gallery: Path) -> bool:
    """Kill one of Ray's workers in the middle of a run, which has to end well; return False if it ended before."""
    with start(corpus, gallery, "ray") as driver:
        wait_for_first_part(driver, gallery)
        found = workers(driver.pid, "MapWorker")
        if found:
            os.kill(found[0].pid, signal.SIGKILL)
        assert driver.wait(200) == 0
    return bool(found)


def test_kill_ray_driver(corpus: Path, undisturbed: tuple[list[dict[str, object]], float], tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    with start(corpus, gallery, "ray") as driver:
        wait_for_first_part(driver, gallery)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    for process in psutil.wait_procs(family, timeout=20)[1]:
        process.kill()
    with start(corpus, gallery, "local") as second:
        assert second.wait(200) == 0
    assert rows(gallery) == undisturbed[0]
    assert verify_gallery(Gallery(str(gallery))).problems == []


def test_kill_ray_worker(corpus: Path, undisturbed: tuple[list[dict[str, object]], float], tmp_path: Path) -> None:
    # On a busy machine a run may end before its worker is found. Then the next one is tried.
    tries = (tmp_path / str(number) for number in range(5))
    gallery = next((gallery for gallery in tries if kill_ray_worker(corpus, gallery)), None)
    assert gallery is not None
    assert rows(gallery) == undisturbed[0]
    assert verify_gallery(Gallery(str(gallery))).problems == []


@pytest.mark.parametrize("runner", ["local", "ray"])
def test_an_image_that_kills_its_worker_becomes_a_row(runner: str, drawings: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(8):
        cv2.imwrite(str(corpus / f"{n:02d}.png"), draw(n))
    for n in (5, 6):
        cv2.imwrite(str(corpus / f"fatal-{n}.png"), np.full((64, 64, 3), (250, 10, 250), np.uint8))
    settings = {"detect": {"model": "fatal-detector"}, "embed": {"model": "fake-embedder"}}
    summary = embed(corpus, tmp_path / "g", settings, runner=runner, workers=2, block_smallest=5)
    assert summary.statuses["crashed"] == 2
    assert summary.images == 10
    crashed = [row for row in rows(tmp_path / "g") if row["status"] == "crashed"]
    assert sorted(Path(row["uri"]).name for row in crashed) == ["fatal-5.png", "fatal-6.png"]
    assert all("died twice" in row["error"] for row in crashed)
    again = embed(corpus, tmp_path / "g", settings, runner="local")
    assert (again.images, again.statuses["crashed"]) == (2, 2), "another worker tries them again"
    third = embed(corpus, tmp_path / "g", settings, runner="local")
    assert third.images == 0, "what crashed is not tried again for ever"


def test_many_images_that_kill_their_worker_do_not_end_the_run(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for n in range(9):
        cv2.imwrite(str(corpus / f"{n:02d}.png"), draw(n))
        if n % 3 == 1:
            cv2.imwrite(str(corpus / f"fatal-{n}.png"), np.full((64, 64, 3), (250, 10, 250), np.uint8))
    settings = {"detect": {"model": "fatal-detector"}, "embed": {"model": "fake-embedder"}}
    summary = embed(corpus, tmp_path / "g", settings, runner="local", workers=1, block_smallest=64)
    assert (summary.statuses["crashed"], summary.images) == (3, 12)
