"""Corpora for the benches: real photos under many names, and small synthetic JPEGs."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np

SHARED = Path(__file__).resolve().parents[3] / "shared"


def repeated_photos(folder: Path, times: int) -> Path:
    """The development photos, each under `times` names."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(times):
        for photo in sorted((SHARED / "data" / "photos-dev").glob("*.jpg")):
            shutil.copyfile(photo, folder / f"{n:03d}-{photo.name}")
    return folder


def small_jpegs(folder: Path, count: int, side: int = 96) -> Path:
    """`count` different JPEGs with a red rectangle each, in folders of a thousand."""
    rng = np.random.default_rng(0)
    for n in range(count):
        place = folder / f"{n // 1000:04d}"
        if n % 1000 == 0:
            os.makedirs(place, exist_ok=True)
        image = np.full((side, side, 3), rng.integers(90, 255), np.uint8)
        x, y, w, h = (int(v) for v in (*rng.integers(0, side // 2, 2), *rng.integers(20, side // 2, 2)))
        image[y : y + h, x : x + w] = (30, 30, 230)
        image[-6:] = rng.integers(0, 255, (6, side, 3))
        cv2.imwrite(str(place / f"{n:07d}.jpg"), image)
    return folder
