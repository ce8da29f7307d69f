"""Synthetic galleries of realistic embeddings: identity centres and noise with the covariances of real ones on LFW.

    python tests/bench/galleries.py OUT --faces 1000000 [--mean 10] [--stats ../shared/data/embedding-stats.npz]

A face is centre + noise, centre ~ N(mean, between), noise ~ N(0, within), then normalised; identities have a geometric
number of faces. Everything is drawn in blocks, so that memory does not grow with the gallery.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.arrow import float_lists
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commit import Committer
from facepipe.gallery.parts import Record, encode, statistics
from facepipe.hashing import image_id
from facepipe.schema import EMBEDDING_DIM, OK, conform

CONTRACT = Contract("synthetic", "0" * 64, "synthetic", "0" * 64, "none", False)
STATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "embedding-stats.npz"
BLOCK = 50_000


@dataclass
class Faces:
    """Draws identities and their faces; the same seed gives the same ones."""

    stats: Path = STATS
    mean_size: float = 10
    seed: int = 0

    def __post_init__(self) -> None:
        found = np.load(self.stats) if self.stats.exists() else _made_up()
        self._mean = found["mean"].astype(np.float32)
        self._between, self._within = (_root(found[name]) for name in ("between", "within"))

    def centres(self, identities: np.ndarray) -> np.ndarray:
        """(n, 128) centres: each identity's own, whenever it is asked for."""
        return self._mean + _normal(identities, self.seed, 0) @ self._between.T

    def draw(self, identities: np.ndarray, stream: int) -> np.ndarray:
        """(n, 128) unit vectors: one face of each identity."""
        rng = np.random.default_rng([self.seed, 1, stream])
        noise = rng.standard_normal((len(identities), EMBEDDING_DIM), np.float32)
        faces = self.centres(identities) + noise @ self._within.T
        return np.ascontiguousarray(faces / np.linalg.norm(faces, axis=1, keepdims=True), np.float32)

    def blocks(self, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(identities, faces) until there are `count`; each block holds whole identities in random order."""
        rng, first, done = np.random.default_rng([self.seed, 2]), 0, 0
        while done < count:
            sizes = rng.geometric(1 / self.mean_size, int(BLOCK / self.mean_size))
            identities = rng.permutation(np.repeat(np.arange(first, first + len(sizes)), sizes))[: count - done]
            yield identities, self.draw(identities, stream=done)
            first, done = first + len(sizes), done + len(identities)


def _made_up() -> dict[str, np.ndarray]:
    """Where the measured covariances are not at hand: falling spectra of about their size."""
    falling = np.exp(-np.arange(EMBEDDING_DIM) / 30)
    flatter = np.exp(-np.arange(EMBEDDING_DIM) / 60)
    mean = np.full(EMBEDDING_DIM, 1.3 / EMBEDDING_DIM**0.5)
    return {
        "mean": mean,
        "between": np.diag(0.243 * falling / falling.sum()),
        "within": np.diag(0.099 * flatter / flatter.sum()),
    }


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    return (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)


def _normal(identities: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Standard normal vectors, a function of the identity: counter-based, by Box and Muller over hashed integers."""
    keys = (identities.astype(np.uint64)[:, None] << np.uint64(8)) + np.arange(EMBEDDING_DIM, dtype=np.uint64)
    u = [_uniform(keys, np.uint64(2 * (seed * 7 + stream) + n)) for n in range(2)]
    return (np.sqrt(-2 * np.log(u[0])) * np.cos(2 * np.pi * u[1])).astype(np.float32)


def _uniform(keys: np.ndarray, salt: np.uint64) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood 2014) as a hash, to (0, 1)."""
    z = keys + np.array([salt + np.uint64(1)]) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def rows(identities: np.ndarray, faces: np.ndarray, first: int) -> pa.Table:
    """Gallery rows."""
    numbers = range(first, first + len(faces))
    ids = (_uniform(np.arange(first, first + len(faces), dtype=np.uint64), np.uint64(99)) * 2**63).astype(np.int64)
    columns = {
        "face_id": pa.array(ids),
        "image_id": pa.array([f"{n:032x}" for n in numbers]),
        "uri": pa.array([f"/synthetic/{n // 1000:06d}/{n:09d}.jpg" for n in numbers]),
        "status": pa.array([OK] * len(faces)),
        "face_index": pa.array(np.zeros(len(faces), np.int16)),
        "identity": pa.array([f"person{n}" for n in identities]),
        "embedding": float_lists(faces),
    }
    return conform(pa.table(columns))


def append(gallery: Gallery, tables: Iterable[pa.Table], run: str) -> None:
    """Commit tables of rows as parts."""
    commit = Committer(Gallery(gallery.path), run)  # others may have written since it was opened
    for n, table in enumerate(tables):
        data = encode(table)
        name = f"part-{run}-{n:06d}-{image_id(data)}.parquet"
        storage.write(storage.join(gallery.faces_folder, name), data)
        commit([Record(n, rows=table.num_rows, path=name, size=len(data), stats=statistics(table))], {})


def make_gallery(path: Path, count: int, faces: Faces | None = None) -> Gallery:
    """A gallery of `count` faces, in files of some 50,000."""
    gallery = Gallery.create(str(path), CONTRACT)
    done = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal done
        for identities, vectors in (faces or Faces()).blocks(count):
            yield rows(identities, vectors, done)
            done += len(vectors)

    append(gallery, tables(), "synthetic")
    return Gallery(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--faces", type=int, default=1_000_000)
    parser.add_argument("--mean", type=float, default=10)
    parser.add_argument("--stats", type=Path, default=STATS)
    args = parser.parse_args()
    gallery = make_gallery(args.out, args.faces, Faces(args.stats, args.mean))
    print(f"{gallery.path}: {args.faces} faces in {len(gallery.files())} files")


if __name__ == "__main__":
    main()
