"""Ten nights in which a corpus is moved, relabelled, filtered, thinned and joined by a second source of its folder's name.

    python tests/bench/nights.py [--images 60] [--seed 0] [--folder FOLDER]

Three sources: a folder tree (labels are folders), a Parquet file (labels are a column, rows have no names), and from the
fourth night on another folder of the same name as the first. Every night is compared with a gallery that is made from
scratch of what the sources hold then: the same images under the same names, labels and sources, the same faces and
vectors, and the same answers to every face as a query. No image may be there twice, none may be gone, and none whose
content its source had the night before may be embedded again.

Models are fakes; everything else is real.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.hashing import compute_image_id
from facepipe.index.search import Index
from pipelines.nightly import pipeline as nightly
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.pipeline import NightSummary

Settings = dict[str, Any]
SIDE = 64
# Columns in which a gallery with a history differs from one made from scratch.
HISTORY = ("face_id", "former_uris", "ingested_at", "fingerprint")
FAKES: Settings = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline", "block_smallest": 4, "block_largest": 32, "commit_seconds": 0.2},
}


@cache
def encode(number: int) -> bytes:
    """Encode a picture with one red rectangle, which the fake detector takes for a face; another one per number."""
    rng = np.random.default_rng(number)
    image = np.full((SIDE, SIDE, 3), int(rng.integers(90, 250)), np.uint8)
    spots = rng.integers(0, 70, (33, 29, 3)).astype(np.uint8)
    spots[..., 2] += 185
    image[12:45, 16:45] = spots
    return cv2.imencode(".png", image)[1].tobytes()


@dataclass
class World:
    """The sources as they should be, and as they lie on the disk.

    Attributes:
        folder: where the sources lie.
        rng: draws what changes.
        trees: per folder source, numbers of the pictures by path.
        places: where each folder source is.
        rows: numbers and labels of the Parquet file's rows.
        excluded: patterns of folders that are not listed.
    """

    folder: Path
    rng: np.random.Generator
    trees: dict[str, dict[str, int]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    rows: list[tuple[int, str]] = field(default_factory=list)
    excluded: tuple[str, ...] = ()
    next: int = 0

    def draw(self, count: int) -> list[int]:
        """Take numbers of new pictures."""
        self.next += count
        return list(range(self.next - count, self.next))

    def choose(self, names: list[str], share: float) -> list[str]:
        """Choose a share of names, one at least."""
        return sorted(self.rng.choice(sorted(names), max(1, round(share * len(names))), replace=False).tolist())

    def write(self) -> None:
        """Bring the disk up to date. Files that stay keep their times; those that changed get new ones."""
        for name, tree in self.trees.items():
            root = self.folder / self.places[name] / "photos"
            present = {str(path.relative_to(root)): path for path in root.rglob("*.png")}
            for path in present.keys() - tree.keys():
                present[path].unlink()
            for path, number in tree.items():
                target = root / path
                if not target.exists() or target.read_bytes() != encode(number):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(encode(number))
        columns = {
            "image": [encode(number) for number, _ in self.rows],
            "label": [label for _, label in self.rows],
        }
        data = pa.table(columns)
        path = self.folder / "rows.parquet"
        if not path.exists() or not pq.read_table(path).equals(data):
            pq.write_table(data, path, row_group_size=16)

    def list_sources(self) -> list[Settings]:
        """List the sources for a nightly config; none has a name of its own."""
        folders = [
            {"uri": str(self.folder / place / "photos"), "exclude": list(self.excluded), "identity": "folder"}
            for place in self.places.values()
        ]
        return [{"missing": "erase", **source} for source in (*folders, {"uri": str(self.folder / "rows.parquet")})]

    def count_contents(self) -> list[Counter[str]]:
        """Count the listed pictures of each source by their hash."""
        listed = [
            [number for path, number in tree.items() if path.split("/")[0] not in self.excluded]
            for tree in self.trees.values()
        ]
        listed.append([number for number, _ in self.rows])
        return [Counter(compute_image_id(encode(number)) for number in numbers) for numbers in listed]


# ---- what happens between nights


def begin(world: World) -> None:
    images = world.next
    world.next = 0
    numbers = world.draw(images)
    half = numbers[: images // 2]
    world.places["first"] = "a"
    world.trees["first"] = {f"person{n % 5}/{n:04d}.png": n for n in half}
    world.rows = [(n, f"person{n % 4}") for n in numbers[images // 2 :]]


def relabel(world: World) -> None:
    """Rename a person's folder, and correct labels of rows."""
    world.trees["first"] = {
        path.replace("person0/", "ann/") if path.startswith("person0/") else path: n
        for path, n in world.trees["first"].items()
    }
    world.rows = [(n, "bob" if at % 7 == 0 else label) for at, (n, label) in enumerate(world.rows)]


def thin(world: World) -> None:
    """Take out a fifth of the files and every fifth row: all later rows get another number."""
    for path in world.choose(list(world.trees["first"]), 0.2):
        del world.trees["first"][path]
    del world.rows[::5]


def join(world: World) -> None:
    """Add a folder of the same name, with pictures of its own and some that the first one has."""
    shared = [world.trees["first"][path] for path in world.choose(list(world.trees["first"]), 0.2)]
    world.places["second"] = "b"
    world.trees["second"] = {f"person{n % 5}/{n:04d}.png": n for n in (*world.draw(len(shared) + 4), *shared)}


def move(world: World) -> None:
    """Mount the first folder elsewhere."""
    old = world.folder / world.places["first"]
    world.places["first"] = "mnt/disk2"
    new = world.folder / world.places["first"]
    new.parent.mkdir(parents=True, exist_ok=True)
    os.rename(old, new)
    old.mkdir()


def filter_folders(world: World) -> None:
    """Leave a person out."""
    world.excluded = ("person1",)


def reorganise(world: World) -> None:
    """Rename files, swap names of two, and put copies and new files beside them."""
    tree = world.trees["first"]
    for path in world.choose(list(tree), 0.3):
        tree[path.replace(".png", "-edited.png")] = tree.pop(path)
    one, two = world.choose(list(tree), 0.01)[0], sorted(tree)[-1]
    tree[one], tree[two] = tree[two], tree[one]
    tree["person2/copy.png"] = tree[sorted(tree)[0]]
    for n in world.draw(4):
        tree[f"person2/{n:04d}.png"] = n
    world.rows.insert(0, (world.draw(1)[0], "carl"))


def move_both(world: World) -> None:
    """Mount the second folder where the first one was, and undo the filter."""
    world.excluded = ()
    old = world.folder / world.places["second"]
    new = world.folder / "a"
    shutil.rmtree(new)
    os.rename(old, new)
    world.places["second"] = "a"


def shuffle(world: World) -> None:
    """Shuffle the rows, and give each of a few files another one's picture."""
    order = world.rng.permutation(len(world.rows)).tolist()
    world.rows = [world.rows[n] for n in order]
    tree = world.trees["second"]
    chosen = world.choose(list(tree), 0.4)
    numbers = [tree[path] for path in chosen]
    for path, number in zip(chosen, [*numbers[1:], numbers[0]], strict=True):
        tree[path] = number


def all_at_once(world: World) -> None:
    thin(world)
    relabel(world)
    move_first_again(world)
    reorganise(world)


def move_first_again(world: World) -> None:
    old = world.folder / world.places["first"]
    world.places["first"] = "archive"
    os.rename(old, world.folder / "archive")


NIGHTS: list[Callable[[World], None]] = [
    begin,
    relabel,
    thin,
    join,
    move,
    filter_folders,
    reorganise,
    move_both,
    shuffle,
    all_at_once,
]


# ---- what a night should come to


@dataclass
class Night:
    """What a night did, and what is wrong with its gallery.

    Attributes:
        change: what happened to the sources before.
        images: images in the gallery.
        counts: figures of the embed steps, summed.
        erased: images that were erased as missing.
        seconds: duration of the night, and of the gallery from scratch.
        problems: differences from the gallery from scratch.
    """

    change: str
    images: int
    counts: dict[str, int]
    erased: int
    seconds: tuple[float, float]
    problems: list[str]


class Simulation:
    """Runs the nights, and compares each with a gallery from scratch."""

    def __init__(self, folder: Path, images: int, seed: int = 0, *, with_clusters: bool = True):
        self.folder = folder
        self.gallery = str(folder / "gallery")
        self.world = World(folder / "sources", np.random.default_rng(seed), next=images)
        self.world.folder.mkdir(parents=True)
        self._with_clusters = with_clusters
        self._known: list[Counter[str]] = []

    def run_night(self, change: Callable[[World], None]) -> Night:
        """Change the sources, run a night, and compare its gallery with one made from scratch."""
        change(self.world)
        self.world.write()
        began = time.monotonic()
        summary = self._run(self.gallery)
        ended = time.monotonic()
        fresh = str(self.folder / "fresh")
        shutil.rmtree(fresh, ignore_errors=True)
        self._run(fresh)
        seconds = (ended - began, time.monotonic() - ended)
        steps = [step for name, step in summary.steps.items() if name.startswith("embed ")]
        names = ("images", "skipped", "moved", "relocated", "relabelled", "missing")
        counts = {name: sum(step[name] for step in steps) for name in names}
        counts["embedded"] = sum(step["statuses"].get("ok", 0) for step in steps)
        counts["copied"] = sum(step["statuses"].get("copied", 0) for step in steps)
        erased = sum(step["images"] for name, step in summary.steps.items() if name.startswith("erase missing"))
        problems = [*summary.failures, *self._compare(fresh), *self._count_embedded(counts["embedded"])]
        return Night(change.__name__, Gallery(self.gallery).counts()["images"], counts, erased, seconds, problems)

    def _run(self, gallery: str) -> NightSummary:
        night = {"missing_at_most": 0.9, "clusters": "make" if self._with_clusters else "no", "dedup": False}
        layers = {"gallery": gallery, "source": self.world.list_sources(), "night": night, "graph": {"threshold": 0.3}}
        return nightly.run(build(NightlyConfig, FAKES, layers))

    def _compare(self, fresh: str) -> list[str]:
        problems = [f"verify: {problem}" for problem in verify_gallery(Gallery(self.gallery)).problems]
        ours, theirs = _read_rows(self.gallery), _read_rows(fresh)
        if ours != theirs:
            here = {json.dumps(row, sort_keys=True) for row in ours}
            there = {json.dumps(row, sort_keys=True) for row in theirs}
            problems += [f"only in the gallery: {row[:300]}" for row in sorted(here - there)[:3]]
            problems += [f"only in one from scratch: {row[:300]}" for row in sorted(there - here)[:3]]
        else:
            problems += _compare_answers(self.gallery, fresh)
        return problems

    def _count_embedded(self, embedded: int) -> list[str]:
        """Tell whether images were embedded whose content their source had the night before."""
        contents = self.world.count_contents()
        known = [*self._known[: len(contents) - 1], *self._known[-1:]] if self._known else []
        if len(known) < len(contents) and known:
            known = [known[0], Counter(), known[-1]]  # the second folder is new
        known = known or [Counter() for _ in contents]
        expected = sum((now - before).total() for now, before in zip(contents, known, strict=True))
        self._known = contents
        return [f"{embedded} images were embedded, {expected} are new"] if embedded > expected else []


def _read_rows(gallery: str) -> list[Settings]:
    table = Gallery(gallery).to_arrow().drop_columns(["thumb", *HISTORY])
    return sorted(table.to_pylist(), key=lambda row: (row["uri"], row["face_index"] or 0))


def _compare_answers(gallery: str, fresh: str) -> list[str]:
    """Search both galleries for every face, and compare uris, labels and distances of all answers."""
    _, vectors = Gallery(fresh).vectors()
    answers = []
    for path in (gallery, fresh):
        index = Index(path)
        hits = index.search(vectors, index.live)
        labels = index.get_labels(np.ascontiguousarray(hits.ids.ravel()))
        columns = (column.to_pylist() for column in labels.columns)
        names = np.array([f"{uri} {label}" for uri, label in zip(*columns, strict=True)]).reshape(hits.ids.shape)
        # In the order of their names, because equal distances may come in any order.
        order = np.argsort(names, axis=1, kind="stable")
        answers.append((np.take_along_axis(names, order, 1), np.take_along_axis(hits.distances, order, 1)))
    (names_here, distances_here), (names_there, distances_there) = answers
    if names_here.shape != names_there.shape or not (names_here == names_there).all():
        return ["searches find other images or labels"]
    farthest = np.abs(distances_here - distances_there).max()
    return [f"searches find the same images {farthest:.4f} away"] if farthest > 1e-3 else []


def simulate(folder: Path, images: int, seed: int = 0, *, with_clusters: bool = True) -> list[Night]:
    """Run all nights."""
    simulation = Simulation(folder, images, seed, with_clusters=with_clusters)
    return [simulation.run_night(change) for change in NIGHTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60, help="images on the first night")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where sources and galleries go; they are deleted again")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPUs; python {shlex.join(sys.argv)}")
    names = ("embedded", "moved", "copied", "relocated", "relabelled", "missing")
    print(f"{'night':16}{'images':>8}" + "".join(f"{name:>11}" for name in names) + f"{'s':>8}{'scratch':>9}")
    is_right = True
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        simulation = Simulation(Path(folder), args.images, args.seed)
        for change in NIGHTS:
            night = simulation.run_night(change)
            figures = "".join(f"{night.counts[name]:11}" for name in names)
            print(
                f"{night.change:16}{night.images:8}{figures}{night.seconds[0]:8.1f}{night.seconds[1]:9.1f}", flush=True
            )
            for problem in night.problems:
                print(f"  WRONG {problem}", flush=True)
            is_right &= not night.problems
    print(f"load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}")
    sys.exit(not is_right)


if __name__ == "__main__":
    main()
