"""Corpora and helpers that several tests share. Data in ../shared is optional: tests that need it skip without it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # tests must not write into the home folder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; the tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip(f"the shared data is not at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def photos(shared: Path) -> Path:
    return shared / "data" / "photos-dev"


def draw(n: int, side: int = 96) -> np.ndarray:
    """An image (BGR) with `n % 3` red rectangles, which the fake detector takes for faces; different for every n."""
    rng = np.random.default_rng(n)
    image = np.full((side, side + n % 7, 3), rng.integers(90, 255), np.uint8)
    for k in range(n % 3):
        x, y = (int(v) for v in rng.integers(0, side // 4, 2))
        low = (x + k * side // 2, y + k * side // 2)
        cv2.rectangle(image, low, (low[0] + 20 + n % 5, low[1] + 24), (30, 30, 230), -1)
    image[-3:] = rng.integers(0, 255, (3, image.shape[1], 3))
    return image


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 PNGs of 0 to 2 'faces' in three folders."""
    root = tmp_path_factory.mktemp("drawings")
    for n in range(60):
        folder = root / f"person{n % 3}"
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"p{n % 3}_{n:03d}.png"), draw(n))
    return root


@pytest.fixture
def fakes() -> dict[str, dict[str, object]]:
    """Settings that replace the models by fakes and cut the work small."""
    return {
        "detect": {"model": "fake-detector"},
        "embed": {"model": "fake-embedder"},
        "run": {"runner": "inline", "block_smallest": 4, "block_largest": 8, "commit_seconds": 0.1},
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server in a process of its own: some calls of clients hold the interpreter."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """An empty S3 store in the environment, with a bucket `faces`; its client."""
    import boto3

    from facepipe import storage

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "FACEPIPE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")).close()
    storage.bucket_store.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="faces")
    yield client
    client.close()
    storage.bucket_store.cache_clear()
