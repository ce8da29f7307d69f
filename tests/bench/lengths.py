"""Compare searches of vectors of two lengths: the same faces with all numbers, and with the first ones.

    python tests/bench/lengths.py --faces 100000 --dims 128 512 [--memory 4GiB]

Faces are drawn as networks with an angular margin place them (tests/hard_faces.py). Rounds of the lengths alternate, so
that other work on the machine slows both. Rates are of one thread.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from bench.galleries import CONTRACT, append, rows
from hard_faces import ArcFaceLike

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.index.search import Index
from facepipe.models.runtime.memory import measure_resident_memory
from pipelines.index import IndexConfig, run

_BLOCK = 20_000
_EACH = 10


@dataclass
class Measured:
    """An index of one length, its queries, and the rates of the rounds."""

    index: Index
    queries: np.ndarray
    truth: np.ndarray
    rates: list[float]


def draw(faces: int, queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw vectors (n, 512) of persons with ten faces each, and of other faces of some of them."""
    space = ArcFaceLike(seed, 0.65, dimension=512)
    persons = faces // _EACH
    centres = space.draw_centres(persons).astype(np.float32)
    blocks = [np.arange(at, min(at + _BLOCK, persons * _EACH)) // _EACH for at in range(0, persons * _EACH, _BLOCK)]
    vectors = np.concatenate([space.draw(centres, person).vectors for person in blocks])
    asked = np.random.default_rng(seed).integers(0, persons, queries)
    return vectors, space.draw(centres, asked).vectors


def shorten(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Keep the first numbers, which hold most of the variance."""
    short = vectors[:, :dim]
    return np.ascontiguousarray(short / np.linalg.norm(short, axis=1, keepdims=True), np.float32)


def measure(folder: Path, vectors: np.ndarray, queries: np.ndarray, dim: int, recall: float, memory: str) -> Measured:
    """Make a gallery and its index, and find the true neighbours."""
    gallery = Gallery.create(str(folder), replace(CONTRACT, dim=dim))
    person = np.arange(len(vectors)) // _EACH
    parts = (slice(at, at + 50_000) for at in range(0, len(vectors), 50_000))
    append(gallery, (rows(person[part], vectors[part], part.start) for part in parts), "bench")
    began = time.monotonic()
    done = run(build(IndexConfig, {"index": {"recall": recall, "memory": memory}}), gallery.path)
    ids, stored = Gallery(gallery.path).vectors()
    truth = ids[faiss.knn(queries, stored, 10)[1]]
    index = Index(gallery.path, threads=1)
    print(
        f"{dim}-D: {done.factory}, built in {time.monotonic() - began:.0f} s, {done.bytes / len(ids):.0f} bytes per face, "
        f"lists {index.setting.nprobe}, re-scored {index.setting.rescore}, resident "
        f"{measure_resident_memory() >> 20} MiB",
        flush=True,
    )
    return Measured(index, queries, truth, [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="4GiB", help="of the building process, which holds all vectors drawn here")
    args = parser.parse_args()
    vectors, queries = draw(args.faces, args.queries)
    with tempfile.TemporaryDirectory() as folder:
        measured = {
            dim: measure(
                Path(folder, str(dim)), shorten(vectors, dim), shorten(queries, dim), dim, args.recall, args.memory
            )
            for dim in args.dims
        }
        for _ in range(args.rounds):
            for one in measured.values():
                began = time.process_time()
                one.index.search(one.queries, 10)
                one.rates.append(len(one.queries) / (time.process_time() - began))
        first = np.median(measured[args.dims[0]].rates)
        for dim, one in measured.items():
            found = one.index.search(one.queries, 10)
            share = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found.ids, one.truth, strict=True)])
            rate = np.median(one.rates)
            print(
                f"{dim}-D: recall@10 {share:.4f}, {rate:.0f} queries per second of CPU, {rate / first:.2f} of the first"
            )


if __name__ == "__main__":
    main()
