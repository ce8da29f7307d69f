"""What a night costs beside building the gallery, step by step, and how that grows with the gallery.

    python tests/bench/nightly.py [--faces FEW MANY] [--change 0.01] [--folder FOLDER]

A corpus of small PNGs with a face each, in a folder for each person. The first night makes all of the gallery: embeddings,
index, clusters, copies. Then a share of the corpus changes: of 1 %, half is added, three tenths are other pictures under the
same name, and two tenths are removed; one person is erased by hand. The second night brings the gallery up to date. In the
larger gallery a third one follows as many changes as the smaller had: what it costs more is what depends on the gallery.

Everything is done for real but the models: faces are marked rectangles, whose colour is the number of a synthetic
embedding of realistic spread (galleries.py). With real models embedding takes some 30 ms an image, and nearly all of the
first night; a night is then the cheaper in comparison.
"""

import argparse
import os
import platform
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import cv2
import numpy as np
from galleries import Faces

from facepipe.config import build
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from facepipe.models import fakes
from pipelines import erase
from pipelines.nightly import pipeline as nightly
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.pipeline import NightSummary

SIDE, GREEN, BLUE = 64, 80, 80
STEPS = ("embed", "index", "assign", "erase", "dedup", "compact")


class Population:
    """Numbered faces: the person and the embedding of each."""

    def __init__(self, count: int, seed: int = 0):
        parts = list(Faces(seed=seed).blocks(count))
        self.person = np.concatenate([part[0] for part in parts])
        self.vectors = np.concatenate([part[1] for part in parts])

    def __len__(self) -> int:
        return len(self.person)


class NumberedEmbedder(fakes.FakeEmbedder):
    """A chip's colour is the number of its embedding."""

    of: Population

    def embed(self, chips: np.ndarray) -> np.ndarray:
        r, g, b = (chips[:, 17, 16, channel].astype(np.int64) for channel in range(3))
        return self.of.vectors[((r - 181) * GREEN + g) * BLUE + b]


def write(path: Path, number: int) -> None:
    """A picture with the face of a number, and a background that no other one has."""
    rng = np.random.default_rng(number)
    image = np.kron(rng.integers(0, 160, (8, 8, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    image[16:48, 16:48] = (number % BLUE, number // BLUE % GREEN, 181 + number // (BLUE * GREEN))
    path.parent.mkdir(exist_ok=True)
    cv2.imwrite(str(path), image)


def corpus(folder: Path, people: Population, count: int) -> list[Path]:
    """The first faces as files."""
    folder.mkdir()
    paths = [folder / f"person{people.person[n]:06d}" / f"{n:07d}.png" for n in range(count)]
    for n, path in enumerate(paths):
        write(path, n)
    return paths


@dataclass
class Night:
    """A summary, the seconds of the erasure by hand before it, and what had changed."""

    summary: NightSummary
    by_hand: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


class Corpus:
    """Files that come, change and go, and the gallery of them."""

    def __init__(self, count: int, most: int, place: Path):
        self.folder, self.gallery = place / "in", str(place / "g")
        self.people = NumberedEmbedder.of = Population(count + 2 * most)
        fakes.FakeEmbedder = NumberedEmbedder  # type: ignore[misc]
        self.paths = corpus(self.folder, self.people, count)
        self.next, self.rng = count, np.random.default_rng(1)
        self.config = build(
            NightlyConfig,
            {"gallery": self.gallery, "source": [{"uri": str(self.folder), "name": "in", "missing": "erase"}]},
            {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}, "run": {"runner": "inline"}},
            {"night": {"clusters": "make"}, "graph": {"threshold": 0.41}},
        )

    def first(self) -> Night:
        return Night(nightly.run(self.config))

    def change(self, images: int) -> dict[str, int]:
        """A day: half of the images are added, three tenths changed, two tenths removed."""
        added, changed, removed = (round(images * part) for part in (0.5, 0.3, 0.2))
        self.rng.shuffle(self.paths)  # type: ignore[arg-type]
        for path in self.paths[:changed]:
            write(path, self._number())
        for path in self.paths[changed : changed + removed]:
            path.unlink()
        del self.paths[changed : changed + removed]
        for _ in range(added):
            n = self._number()
            write(self.folder / f"person{self.people.person[n]:06d}" / f"{n:07d}.png", n)
        return {"added": added, "changed": changed, "removed": removed}

    def _number(self) -> int:
        self.next += 1
        return self.next - 1

    def night(self, images: int) -> Night:
        counts = self.change(images)
        began = time.perf_counter()
        person = Selection(identities=(self.paths.pop().parent.name,))
        counts["erased by hand"] = erase.run(person, self.gallery).images
        by_hand = time.perf_counter() - began
        self.paths = [path for path in self.paths if path.parent.name != person.identities[0]]
        summary = nightly.run(self.config)
        assert summary.failures == []
        return Night(summary, by_hand, counts)


def show(first: Night, night: Night, gallery: str) -> None:
    faces = sum(file["faces"] for file in Gallery(gallery).files())
    print(f"\n{faces} faces; {', '.join(f'{n} {what}' for what, n in night.counts.items())}")
    print(f"{'step':24}{'first night, s':>16}{'this night, s':>16}{'share':>9}")
    seconds, whole = night.summary.seconds, first.summary.seconds
    for step in STEPS:
        share = f"{seconds[step] / whole[step]:9.1%}" if whole[step] > 0.5 else ""
        print(f"{step:24}{whole[step]:16.2f}{seconds[step]:16.2f}{share}")
    total, part = sum(whole.values()), sum(seconds.values())
    print(f"{'all':24}{total:16.2f}{part:16.2f}{part / total:9.1%}")
    print(f"{'one person, by hand':24}{'':16}{night.by_hand:16.2f}")
    for step in ("erase missing in", "index", "dedup"):
        phases = night.summary.steps.get(step, {}).get("seconds", {})
        print(f"  {step}: " + ", ".join(f"{phase} {spent:.2f}" for phase, spent in phases.items()))
    print(f"  load average {', '.join(f'{load:.1f}' for load in os.getloadavg())}", flush=True)


def measured(count: int, changes: list[int], folder: str | None) -> list[Night]:
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        made = Corpus(count, sum(changes), place)
        nights = [made.first()]
        for images in changes:
            nights.append(made.night(images))
            show(nights[0], nights[-1], made.gallery)
    finally:
        shutil.rmtree(place)
    return nights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, nargs=2, default=[10_000, 100_000], metavar=("FEW", "MANY"))
    parser.add_argument("--change", type=float, default=0.01)
    parser.add_argument("--folder", help="where the corpora and galleries go; they are deleted again")
    args = parser.parse_args()
    print(f"{date.today()}, {platform.node()}, {os.cpu_count()} CPUs; python {shlex.join(sys.argv)}")
    few, many = args.faces
    small = measured(few, [round(few * args.change)], args.folder)
    large = measured(many, [round(many * args.change), round(few * args.change)], args.folder)
    print(f"\nthe same number of changes in {many} faces instead of {few} takes, in times of the latter:")
    ends = (small[-1].summary.seconds, large[-1].summary.seconds)
    print(", ".join(f"{step} {ends[1][step] / max(0.01, ends[0][step]):.1f}" for step in STEPS))


if __name__ == "__main__":
    main()
