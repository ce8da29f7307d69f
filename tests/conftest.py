"""Corpora and helpers that several tests share. Data in ../shared is optional: tests that need it skip without it."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # tests must not write into the home folder

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
