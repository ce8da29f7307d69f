"""Measure what searches for 1, 10, 100 and 1,000 neighbours, and within radii, find, and how fast they are.

    python tests/bench/asked_recall.py [--faces 1000000] [--gallery FOLDER]

The faces are drawn by `hard_faces.py`, ten a person on average. Every query is a face of the gallery that is searched
with itself left out. An index in the folder is used again.
"""
# ruff: noqa: E402

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

# The repository comes before tests/, which has a folder of the package's name.
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from bench.galleries import CONTRACT, append, rows
from hard_faces import DlibLike, draw_geometric

from facepipe.evaluation.index import measure_asked
from facepipe.gallery import Gallery
from facepipe.index import manifest as manifests
from facepipe.index.search import Index
from pipelines.index import IndexConfig
from pipelines.index import run as build_index

_MEAN_SIZE = 10
_BLOCK = 50_000


def make_gallery(folder: str, count: int) -> None:
    """Make a gallery of faces in a random order."""
    space = DlibLike(1)
    person = draw_geometric(count, _MEAN_SIZE, 1)
    centres = space.draw_centres(int(person.max()) + 1).astype(np.float32)
    person = person[np.random.default_rng(0).permutation(count)]
    gallery = Gallery.create(folder, CONTRACT)
    parts = (person[at : at + _BLOCK] for at in range(0, count, _BLOCK))
    tables = (rows(part, space.draw(centres, part).vectors, at * _BLOCK) for at, part in enumerate(parts))
    append(gallery, tables, "hard")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--gallery")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.gallery or f"{scratch}/G"
        if not Gallery.exists(folder):
            make_gallery(folder, args.faces)
        if not manifests.exists(folder):
            print(build_index(IndexConfig(), folder).seconds, flush=True)
        index = Index(folder)
        print("asked for            lists, re-scored   recall            stated    queries/s")
        for one in measure_asked(index, seed=5):
            name = f"{one.k} nearest" if one.k is not None else f"within {one.radius:g}"
            recall = "none" if one.recall is None else f"{one.recall:.4f} ± {one.standard_error:.4f}"
            stated = "unknown" if one.stated is None else f"{one.stated:.4f}"
            print(f"{name:20} {one.nprobe:5}, {one.rescore:5}   {recall:17} {stated:7} {one.qps:9.0f}", flush=True)


if __name__ == "__main__":
    main()
