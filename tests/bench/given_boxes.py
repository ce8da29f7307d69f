"""Compare ways to the five landmarks of given boxes: inside the box, on the whole picture, or where a template has them.

    python tests/bench/given_boxes.py GALLERY IMAGES PAIRS WORK [--folds 2]

GALLERY holds the faces of IMAGES by the detector (`facepipe embed lfw-dev/images GALLERY`), and PAIRS is LFW's pairs.txt, of
which the first folds are used. Lists of boxes are made from the gallery: as they are, moved by 5 % of their sides, and
enlarged by a half and moved by 10 %. The row "whole picture" is the gallery itself: landmarks of a search of the whole
picture, matched with the box by overlap, are the gallery's own.
"""

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from facepipe.config import build
from facepipe.evaluation.pairs import evaluate_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.gallery import Gallery
from facepipe.stages import given
from pipelines.embed import EmbedConfig, run


def write_lists(gallery: Gallery, images: Path, work: Path) -> dict[str, list[str]]:
    """Write lists of the gallery's faces."""
    columns = ["uri", "box", "landmarks", "det_score"]
    rows = gallery.to_arrow(columns, where="status = 'ok'").to_pylist()
    rng = np.random.default_rng(5)
    lists = {}
    for title, growth, shift in (("exact", 0.0, 0.0), ("moved", 0.0, 0.05), ("loose", 0.5, 0.1)):
        path = work / f"{title}.csv"
        with path.open("w") as file:
            file.write("path,x,y,w,h\n")
            for row in rows:
                left, top, right, bottom = row["box"]
                width = right - left
                height = bottom - top
                left += (rng.uniform(-shift, shift) - growth / 2) * width
                top += (rng.uniform(-shift, shift) - growth / 2) * height
                name = Path(row["uri"]).relative_to(images.resolve())
                file.write(f"{name},{left:.2f},{top:.2f},{width * (1 + growth):.2f},{height * (1 + growth):.2f}\n")
        lists[title] = [str(path)]
    path = work / "landmarks.csv"
    with path.open("w") as file:
        file.write(f"path,{','.join(f'p{point}{axis}' for point in range(1, 6) for axis in 'xy')}\n")
        for row in rows:
            name = Path(row["uri"]).relative_to(images.resolve())
            file.write(f"{name},{','.join(f'{value:.3f}' for value in row['landmarks'])}\n")
    lists["landmarks"] = [*lists["exact"], str(path)]
    return lists


def place_all(self: given.DetectGiven, searches: list, results: list) -> None:
    """Place the landmarks of all faces as the template has them."""
    for search in searches:
        faces = results[search.row]
        faces.landmarks[search.face] = given.place_landmarks(faces.boxes[search.face].astype(np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("gallery", "images", "pairs", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--folds", type=int, default=2)
    arguments = parser.parse_args()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    lines = arguments.pairs.read_text().splitlines()
    pairs = work / "pairs.txt"
    pairs.write_text("\n".join([f"{arguments.folds}\t300", *lines[1 : 1 + 600 * arguments.folds]]) + "\n")
    names = sorted({name for pair in read_pairs(pairs) for name in (pair.left, pair.right)})
    paths = {f"{path.parent.name}/{path.stem}": path for path in arguments.images.rglob("*.jpg")}
    images = work / "images.txt"
    images.write_text("".join(f"{paths[name].resolve()}\n" for name in names))
    gallery = Gallery(str(arguments.gallery))
    lists = write_lists(gallery, arguments.images, work)
    print(f"{'boxes':10} {'landmarks':16} {'images':>6} {'no face':>7} {'accuracy':>8} {'TAR@1e-2':>8} {'CPU s':>6}")
    found = evaluate_pairs(gallery, pairs)
    print(f"{'-':10} {'whole picture':16} {len(names):6} {'':7} {found.accuracy:8.4f} {found.tar['0.01']:8.4f}")
    runs: list[tuple[str, str, Callable[[], object]]] = [
        ("landmarks", "given", lambda: patch.object(given, "_MARGIN", 0.3))
    ]
    for title in ("exact", "moved", "loose"):
        runs += [
            (title, f"inside +{margin}", lambda margin=margin: patch.object(given, "_MARGIN", margin))
            for margin in (0.3, 1.0)
        ]
        runs.append((title, "template", lambda: patch.object(given.DetectGiven, "_find_landmarks", place_all)))
    for title, label, change in runs:
        path = work / "gallery"
        shutil.rmtree(path, ignore_errors=True)
        begin = sum(os.times()[:4])
        source = {"uri": str(images), "boxes": lists[title], "identity": "none"}
        with change():  # type: ignore[attr-defined]
            summary = run(build(EmbedConfig, {"source": source, "run": {"runner": "inline"}}), str(path))
        seconds = sum(os.times()[:4]) - begin
        found = evaluate_pairs(Gallery(str(path)), pairs)
        print(
            f"{title:10} {label:16} {summary.images:6} {summary.statuses.get('no_face', 0):7} {found.accuracy:8.4f} "
            f"{found.tar['0.01']:8.4f} {seconds:6.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
