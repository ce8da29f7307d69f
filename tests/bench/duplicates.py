"""Measure precision and recall on planted duplicates among look-alikes, and imagededup's PHash on the same files.

    python tests/bench/duplicates.py LFW_FOLDER [PHOTOS_FOLDER] [--originals 300] [--seed 1] [--work FOLDER]
        [--phash-python PYTHON_WITH_IMAGEDEDUP] [--sheet FOUND.jpg]

Every original gets one copy of each kind; all other images stay as look-alikes, the different photos of one person among
them. Pairs of different pictures are drawn side by side with --sheet. Precision of `same_shot` pairs is that of one picture, which
they are not meant to show: look at the sheet.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe import Gallery
from facepipe.arrow import to_vectors
from facepipe.curation.duplicates import DuplicateRule, Duplicates, find_duplicates
from facepipe.nearest.similarity import Pairs
from facepipe.schema import DEFAULT_DIM
from facepipe.sources import SourceConfig
from pipelines.embed import EmbedConfig, RunConfig, run

Pixels = np.ndarray[Any, Any]
COLUMNS = [
    *("face_id", "image_id", "uri", "source", "identity", "image_hash", "width", "height"),
    *("face_index", "sharpness", "face_px", "ingested_at", "fingerprint", "embedding"),
]

# Found by this script among the originals, and seen by eye to be one picture (the first two names of LFW are one error).
NATURAL = {
    "Martha_Bowen_0002": "Gabrielle_Rose_0001",
    "Leslie_Ann_Woodward_0002": "Leslie_Ann_Woodward_0001",
    "Prince_Willem-Alexander_0003": "Prince_Willem-Alexander_0002",
    "img11_reflection": "img11",
}


def crop(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Cut up to 5 % off every side."""
    h, w = image.shape[:2]
    top, bottom, left, right = (rng.uniform(0, 0.05, 4) * (h, h, w, w)).round().astype(int)
    return image[top : h - bottom, left : w - right]


def recolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Change hue, gamma, contrast and brightness."""
    hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.int32)
    hsv[..., 0] = (hsv[..., 0] + rng.integers(-10, 11)) % 180
    turned = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR).astype(np.float32) / 255
    shifted = (turned ** rng.uniform(0.75, 1.33) - 0.5) * rng.uniform(0.8, 1.2) + 0.5 + rng.uniform(-0.08, 0.08)
    return np.asarray(np.clip(shifted * 255, 0, 255), np.uint8)


def make_resize(factor: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    return lambda image, rng: cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


# kind of copy -> (what happens to the pixels, quality of the new JPEG); None: the bytes are copied
KINDS: dict[str, tuple[Callable[[Pixels, np.random.Generator], Pixels], int] | None] = {
    "exact": None,
    "resized 0.6": (make_resize(0.6), 90),
    "resized 0.4": (make_resize(0.4), 90),
    "recompressed q30": (lambda image, rng: image, 30),
    "cropped 5 %": (crop, 90),
    "mirrored": (lambda image, rng: image[:, ::-1], 90),
    "colour-shifted": (recolour, 90),
}


def plant_copies(sources: list[Path], out: Path, originals: int, seed: int) -> dict[str, tuple[str, str]]:
    """Copy all images and plant copies of some; returns original and kind by the path of each copy."""
    rng = np.random.default_rng(seed)
    files = [p for source in sources for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".png")]
    planted = {}
    chosen = set(rng.choice(len(files), min(originals, len(files)), replace=False).tolist())
    photos = {n for n, p in enumerate(files) if p.is_relative_to(sources[-1])} if len(sources) > 1 else set()
    for n, file in enumerate(files):
        folder = out / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
        if n not in chosen | photos:
            continue
        image = np.asarray(cv2.imread(str(file)))
        for k, (kind, change) in enumerate(KINDS.items()):
            name = f"{file.stem}~{k}.jpg"
            if change is None:
                shutil.copy(file, folder / name)
            else:
                cv2.imwrite(str(folder / name), change[0](image, rng), [cv2.IMWRITE_JPEG_QUALITY, change[1]])
            planted[str(folder / name)] = (str(folder / file.name), kind)
    return planted


def find_edges(x: np.ndarray[Any, np.dtype[np.float32]], radius: float) -> tuple[Any, Any, Any]:
    """Find u, v and distance of all pairs u < v within the radius, by brute force."""
    us, vs, ds = [], [], []
    for at in range(0, len(x), 1024):
        square = 2 - 2 * (x[at : at + 1024] @ x.T)
        u, v = np.nonzero(square < radius * radius)
        later = u + at < v
        us.append(u[later] + at)
        vs.append(v[later])
        ds.append(np.linalg.norm(x[us[-1]] - x[vs[-1]], axis=1))
    return np.concatenate(us), np.concatenate(vs), np.concatenate(ds)


def read_faces(gallery: Gallery) -> tuple[pa.Table, Any]:
    """Read the faces in node order, then the images without any, and the vectors of the faces."""
    table = gallery.to_arrow(COLUMNS, "image_id is not null").sort_by([("face_id", "ascending")])
    x = to_vectors(table["embedding"].drop_null(), DEFAULT_DIM)
    size = pc.list_element(pc.split_pattern(table["fingerprint"], "-", max_splits=1), 0).cast(pa.int64())
    faces = table.drop_columns(["embedding", "fingerprint"]).append_column("file_size", size)
    return faces.append_column("side", pa.array(np.zeros(table.num_rows, np.int8))), x


class PlantedTruth:
    """Which files show the same picture: planted copies, and the duplicates that the corpora hold themselves."""

    def __init__(self, planted: dict[str, tuple[str, str]]):
        self.planted = planted

    def get_picture(self, uri: str) -> str:
        stem = Path(self.planted.get(uri, (uri, ""))[0]).stem
        return NATURAL.get(stem, stem)

    def is_same(self, a: str, b: str) -> bool:
        return self.get_picture(a) == self.get_picture(b)

    def list_copies(self, kind: str) -> list[tuple[str, str]]:
        """List copy and original of a kind."""
        return [(copy, original) for copy, (original, k) in self.planted.items() if k == kind]

    def print_precision(self, what: str, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Print the precision, and return the pairs that do not show the same picture."""
        wrong = [pair for pair in pairs if not self.is_same(*pair)]
        share = 1 - len(wrong) / max(len(pairs), 1)
        print(f"{what:24} {len(pairs):6} pairs, {len(wrong):5} of different pictures, precision {share:.4f}")
        return wrong


def print_report(found: Duplicates, truth: PlantedTruth) -> list[tuple[str, str]]:
    """Print recall by kind of copy and precision by kind of pair, and return the pairs of different pictures."""
    pairs = {frozenset((p["uri_a"], p["uri_b"])): p["kind"] for p in found.pairs.to_pylist()}
    kept = {row["uri"]: row["kept_uri"] or row["uri"] for row in found.decisions.to_pylist()}
    print(f"{'recall':24} {'copies':>6} {'paired with the original':>25} {'in one group with it':>23}")
    for kind in KINDS:
        mine = truth.list_copies(kind)
        paired = sum(pairs.get(frozenset(pair)) in ("exact", "near") for pair in mine)
        together = sum(kept[c] == kept[o] for c, o in mine)
        print(f"{kind:24} {len(mine):6} {paired / len(mine):25.3f} {together / len(mine):23.3f}")
    beyond = []
    for kind in ("exact", "near", "same_shot"):
        beyond += truth.print_precision(kind, [(min(p), max(p)) for p, k in pairs.items() if k == kind])
    dropped = [(uri, stays) for uri, stays in kept.items() if uri != stays]
    truth.print_precision("dropped for the kept", dropped)
    return beyond


def draw_sheet(pairs: list[tuple[str, str]], out: str, max_pairs: int = 48) -> None:
    """Draw pairs side by side, to look at."""
    tiles = []
    for a, b in pairs[:max_pairs]:
        both = [cv2.resize(np.asarray(cv2.imread(uri)), (150, 150)) for uri in (a, b)]
        tile = cv2.copyMakeBorder(np.hstack(both), 0, 18, 0, 8, cv2.BORDER_CONSTANT)
        text = f"{Path(a).stem[:22]} | {Path(b).stem[:22]}"
        cv2.putText(tile, text, (2, 163), cv2.FONT_HERSHEY_PLAIN, 0.65, (255, 255, 255))
        tiles.append(tile)
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 4)
    cv2.imwrite(out, np.vstack([np.hstack(tiles[n : n + 4]) for n in range(0, len(tiles), 4)]))


PHASH = """
import json, sys
from imagededup.methods import PHash
hasher = PHash(verbose=False)
codes = {f: hasher.encode_image(image_file=f) for f in json.load(sys.stdin)}
found = hasher.find_duplicates(encoding_map={f: c for f, c in codes.items() if c}, max_distance_threshold=10)
json.dump(found, sys.stdout)
"""


def print_phash_figures(python: str, truth: PlantedTruth, files: list[str]) -> None:
    """Print the same figures for imagededup's PHash at its default threshold."""
    began = time.perf_counter()
    done = subprocess.run([python, "-c", PHASH], input=json.dumps(files), capture_output=True, text=True, check=True)
    found = json.loads(done.stdout[done.stdout.index("{") :])
    print(f"imagededup PHash, max_distance_threshold 10, {time.perf_counter() - began:.0f} s")
    for kind in KINDS:
        mine = truth.list_copies(kind)
        print(f"{kind:24} {len(mine):6} {sum(c in found.get(o, ()) for c, o in mine) / len(mine):25.3f}")
    truth.print_precision(
        "PHash", sorted({(min(a, b), max(a, b)) for a, others in found.items() for b in others if a != b})
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--originals", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work")
    parser.add_argument("--phash-python")
    parser.add_argument("--sheet")
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp())
    planted = plant_copies(args.sources, work / "corpus", args.originals, args.seed)
    source = SourceConfig(str(work / "corpus"), identity="folder")
    run(EmbedConfig(source=source, run=RunConfig(runner="local")), str(work / "gallery"))
    faces, x = read_faces(Gallery(str(work / "gallery")))
    rule = DuplicateRule()
    linked = find_edges(x, rule.radius)
    began = time.perf_counter()
    found = find_duplicates(faces, Pairs(*linked), rule)
    seconds = time.perf_counter() - began
    images = found.decisions.num_rows
    print(f"{images} images, {faces.num_rows} faces, {len(linked[0])} pairs of faces within {rule.radius}", end="")
    print(f", {len(planted)} copies of {len(planted) // len(KINDS)} originals; classified in {seconds:.2f} s")
    truth = PlantedTruth(planted)
    beyond = print_report(found, truth)
    if args.sheet and beyond:
        draw_sheet(beyond, args.sheet)
    if args.phash_python:
        print_phash_figures(args.phash_python, truth, found.decisions["uri"].to_pylist())
    if not args.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
