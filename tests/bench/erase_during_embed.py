"""How long an erasure takes while an embed is running: until the person is hidden everywhere, and until all is deleted.

    python tests/bench/erase_during_embed.py [--faces 200000] [--images 20000] [--folder FOLDER]

A gallery of synthetic faces with an index gets images by a `facepipe embed` in another process. Some of the images are of
the person, before and after the request. The models are fakes; everything else is done for real. While the erasure is
under way, readers that were opened before it ask for the person again and again: a gallery, an index, and an export.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from galleries import Faces, append, rows

from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import StorageError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.export import export_parquet
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from pipelines import erase, index

PERSON = "person7"
PERSONS = 500
SETTINGS = ("detect.model=fake-detector", "embed.model=fake-embedder", "run.commit_seconds=5", "align.thumbs=false")


@dataclass
class Readers:
    """Readers that ask for the person until they no longer get anybody.

    Attributes:
        hidden_at: when each reader no longer returned the person, in seconds since the erasure was requested.
    """

    gallery: str
    started_at: float = 0.0
    hidden_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._table = Gallery(self.gallery)
        self._index = Index(self.gallery)
        # The index was built before the embed began, so it holds some of the faces.
        ids, vectors = self._table.vectors(f"identity = '{PERSON}'")
        is_indexed = np.array([uri is not None for uri in self._index.get_labels(ids)["uri"].to_pylist()])
        self._ids = ids[is_indexed]
        self._vectors = vectors[is_indexed]
        assert self._count_hits(self._index)

    def ask(self, done: threading.Event) -> None:
        """Ask until all readers return nobody, or the erasure is complete."""
        questions: dict[str, Callable[[], int]] = {
            "open gallery": lambda: self._count_rows(self._table),
            "new gallery": lambda: self._count_rows(Gallery(self.gallery)),
            "open index": lambda: self._count_hits(self._index),
            "new index": lambda: self._count_hits(Index(self.gallery)),
            "export": self._count_exported,
        }
        while len(self.hidden_at) < len(questions) and not done.is_set():
            for name, question in questions.items():
                if name not in self.hidden_at and question() == 0:
                    self.hidden_at[name] = time.monotonic() - self.started_at

    def _count_rows(self, gallery: Gallery) -> int:
        try:
            return gallery.to_arrow(["face_id"], f"identity = '{PERSON}'").num_rows
        except StorageError:
            return 0  # its files are deleted

    def _count_hits(self, opened: Index) -> int:
        return int(np.isin(opened.search(self._vectors[:20], k=20).ids, self._ids).sum())

    def _count_exported(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            return export_parquet(Gallery(self.gallery), f"{folder}/out", ["uri"], f"identity = '{PERSON}'")


def draw_corpus(root: Path, count: int) -> None:
    """Draw images with one face each, in a folder per person."""
    rng = np.random.default_rng(0)
    for n in range(count):
        image = rng.integers(90, 250, (48, 48, 3), np.uint8)
        cv2.rectangle(image, (8, 8), (34, 38), (20, 20, 240), -1)
        image[10:14, 10:14] = rng.integers(0, 60, 3)
        folder = root / f"{n * PERSONS // count:03d}" if n % 40 else root / "all"
        folder = folder / (PERSON if n % 50 == 0 else f"person{n % PERSONS}")
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{n:06d}.png"), image)


def make_gallery(path: Path, faces: int) -> Gallery:
    """Make a gallery of the fakes' contract with synthetic faces, and its index."""
    gallery = Gallery.create(str(path), Contract.from_models("fake-detector", "fake-embedder", True))
    drawn = 0
    for identities, vectors in Faces().blocks(faces):
        append(gallery, [rows(identities, vectors, drawn)], f"synthetic{drawn}")
        drawn += len(vectors)
    index.run(index.IndexConfig(), gallery.path)
    return Gallery(gallery.path)


def start_embed(corpus: Path, gallery: str) -> subprocess.Popen[bytes]:
    """Start an embed in another process."""
    words = ["embed", str(corpus), gallery, "--runner", "local", "--workers", "1", "--identity", "folder", "--quiet"]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return subprocess.Popen([sys.executable, "-m", "jobs.cli", *words, *settings])


def count_images(gallery: str) -> int:
    """Count the rows of the person from the corpus."""
    return sum("synthetic" not in uri for uri in Gallery(gallery).to_arrow(["uri"])["uri"].to_pylist())


def measure(folder: Path, faces: int, images: int) -> dict[str, Any]:
    """Run the erasure during the embed, and return what was seen."""
    corpus = folder / "corpus"
    draw_corpus(corpus, images)
    gallery = make_gallery(folder / "g", faces).path
    process = start_embed(corpus, gallery)
    while count_images(gallery) < images // 20:
        assert process.poll() is None, "the embed ended too early: more --images"
        time.sleep(1)
    before = Gallery(gallery).to_arrow(["uri"], f"identity = '{PERSON}'").num_rows
    readers = Readers(gallery)
    done = threading.Event()
    thread = threading.Thread(target=readers.ask, args=(done,))
    readers.started_at = time.monotonic()
    thread.start()
    summary = erase.run(Selection(identities=(PERSON,)), gallery)
    seconds = time.monotonic() - readers.started_at
    was_running = process.poll() is None
    began = time.monotonic()
    problems = [line for path in summary.receipts for line in check_erased(Gallery(gallery), load_receipt(path))]
    proof = time.monotonic() - began
    done.set()
    thread.join()
    # What the embed brings afterwards leaves the person out.
    assert process.wait(1800) == 0
    opened = Gallery(gallery)
    receipts = [load_receipt(str(path)) for path in Path(gallery, "erased").glob("*.json")]
    return {
        "faces in the gallery": faces,
        "images to embed": images,
        "rows of the person when requested": before,
        "embed was running when all was deleted": was_running,
        "seconds until recorded": summary.seconds["hide"],
        "seconds until hidden": {name: round(at, 2) for name, at in readers.hidden_at.items()},
        "seconds until all is deleted": round(seconds, 2),
        "problems of the proof, while the embed goes on": problems,
        "seconds of the proof": round(proof, 2),
        "rows of the person after the embed": opened.to_arrow(["uri"], f"identity = '{PERSON}'").num_rows,
        "images deleted from the table": sum(made.images for made in receipts if not made.continues),
        "images taken out of blocks": sum(made.images for made in receipts if made.continues),
        "receipts": len(receipts),
        "problems of all proofs after the embed": [line for made in receipts for line in check_erased(opened, made)],
        # The ids of synthetic faces are not hashes of their images.
        "problems of the gallery": [
            line for line in verify_gallery(opened).problems + verify_index(opened) if "do not belong" not in line
        ],
    }


def main() -> None:
    """Measure, and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=200_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="facepipe-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        print(json.dumps(measure(folder, args.faces, args.images), indent=1))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
