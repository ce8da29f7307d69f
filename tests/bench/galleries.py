"""Draw synthetic galleries of realistic embeddings, with the covariances of real ones on LFW.

    python tests/bench/galleries.py OUT --faces 1000000 [--mean 10]

A face is the unit vector of centre + noise, with centre ~ N(mean, between) and noise ~ N(0, within). Identities have a
geometric number of faces. Everything is drawn in blocks, so memory does not grow with the gallery.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from facepipe import storage
from facepipe.arrow import to_float_lists
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.parts import PartRecord, compute_statistics, encode_parquet
from facepipe.hashing import compute_image_id
from facepipe.schema import DEFAULT_DIM, OK, conform

CONTRACT = Contract("synthetic", "0" * 64, "synthetic", "0" * 64, "none", False)
STATS = Path(__file__).resolve().parents[1] / "data" / "embedding-stats.npz"
BLOCK = 50_000


@dataclass
class Faces:
    """Draw identities and their faces; the same seed gives the same ones.

    Attributes:
        stats: file with the mean and the two covariances.
        mean_size: faces per identity, on average.
        seed: random seed.
    """

    stats: Path = STATS
    mean_size: float = 10
    seed: int = 0

    def __post_init__(self) -> None:
        stats = np.load(self.stats)
        self._mean = stats["mean"].astype(np.float32)
        self._between = _root(stats["between"])
        self._within = _root(stats["within"])

    def centres(self, identities: np.ndarray) -> np.ndarray:
        """Return the centre of each identity, (n, 128); an identity always has the same one."""
        return self._mean + _normal(identities, self.seed, 0) @ self._between.T

    def draw(self, identities: np.ndarray, stream: int) -> np.ndarray:
        """Draw one face per identity: unit vectors, (n, 128). Another stream gives other faces."""
        rng = np.random.default_rng([self.seed, 1, stream])
        noise = rng.standard_normal((len(identities), DEFAULT_DIM), np.float32)
        faces = self.centres(identities) + noise @ self._within.T
        return np.ascontiguousarray(faces / np.linalg.norm(faces, axis=1, keepdims=True), np.float32)

    def blocks(self, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (identities, faces) until there are `count` faces.

        Each block holds whole identities in random order; only the last identities may be cut.
        """
        rng = np.random.default_rng([self.seed, 2])
        first_identity = 0
        drawn = 0
        while drawn < count:
            sizes = rng.geometric(1 / self.mean_size, int(BLOCK / self.mean_size))
            whole = np.repeat(np.arange(first_identity, first_identity + len(sizes)), sizes)
            identities = rng.permutation(whole)[: count - drawn]
            yield identities, self.draw(identities, stream=drawn)
            first_identity += len(sizes)
            drawn += len(identities)


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance.astype(np.float64))
    return (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)


def _normal(identities: np.ndarray, seed: int, stream: int) -> np.ndarray:
    """Draw standard normal vectors that are a function of the identity: Box-Muller over hashed integers."""
    keys = (identities.astype(np.uint64)[:, None] << np.uint64(8)) + np.arange(DEFAULT_DIM, dtype=np.uint64)
    u = [_uniform(keys, np.uint64(2 * (seed * 7 + stream) + n)) for n in range(2)]
    return (np.sqrt(-2 * np.log(u[0])) * np.cos(2 * np.pi * u[1])).astype(np.float32)


def _uniform(keys: np.ndarray, salt: np.uint64) -> np.ndarray:
    """Hash keys to (0, 1) with SplitMix64 (Steele, Lea, Flood 2014)."""
    z = keys + np.array([salt + np.uint64(1)]) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53


def rows(identities: np.ndarray, faces: np.ndarray, first: int) -> pa.Table:
    """Build gallery rows, one image per face; `first` is the number of the first image."""
    numbers = range(first, first + len(faces))
    ids = (_uniform(np.arange(first, first + len(faces), dtype=np.uint64), np.uint64(99)) * 2**63).astype(np.int64)
    columns = {
        "face_id": pa.array(ids),
        "image_id": pa.array([f"{n:032x}" for n in numbers]),
        "uri": pa.array([f"/synthetic/{n // 1000:06d}/{n:09d}.jpg" for n in numbers]),
        "status": pa.array([OK] * len(faces)),
        "face_index": pa.array(np.zeros(len(faces), np.int16)),
        "identity": pa.array([f"person{n}" for n in identities]),
        "embedding": to_float_lists(faces),
    }
    return conform(pa.table(columns))


def make_labelled_rows(count: int, mean: float) -> Iterator[pa.Table]:
    """Draw the rows of a gallery with wrong labels and copies.

    One face in twenty has a wrong label, one in twenty is a near copy of the one before it, and one in fifty an exact copy.
    """
    rng = np.random.default_rng(5)
    drawn = 0
    for identities, vectors in Faces(mean_size=mean).blocks(count):
        fate = rng.random(len(vectors))
        fate[0] = 1
        labels = np.where(fate < 0.05, rng.permutation(identities), identities)
        hashes = rng.integers(0, 1 << 62, len(vectors), dtype=np.int64)
        images = np.arange(drawn, drawn + len(vectors))
        for at in np.flatnonzero((fate >= 0.05) & (fate < 0.12)):
            vectors[at] = vectors[at - 1] + (fate[at] < 0.1) * rng.normal(0, 0.004, vectors.shape[1])
            vectors[at] /= np.linalg.norm(vectors[at])
            labels[at] = labels[at - 1]
            hashes[at] = hashes[at - 1] ^ (1 << int(rng.integers(0, 60)) if fate[at] < 0.1 else 0)
            images[at] = images[at - 1] if fate[at] >= 0.1 else images[at]
        table = rows(labels, vectors, drawn)
        columns = {
            "image_hash": pa.array(hashes, conform(table).schema.field("image_hash").type),
            "image_id": pa.array([f"{n:032x}" for n in images]),
            "width": pa.array(rng.integers(200, 2000, len(vectors)), pa.int32()),
            "height": pa.array(rng.integers(200, 2000, len(vectors)), pa.int32()),
            "embedding": to_float_lists(vectors),
        }
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), name, column)
        yield conform(table)
        drawn += len(vectors)


def append(gallery: Gallery, tables: Iterable[pa.Table], run: str) -> None:
    """Commit each table of rows as a part."""
    commit = Committer(Gallery(gallery.path), run)  # opened again: others may have written since
    for n, table in enumerate(tables):
        data = encode_parquet(table)
        name = f"part-{run}-{n:06d}-{compute_image_id(data)}.parquet"
        storage.write(storage.join(gallery.faces_folder, name), data)
        commit([PartRecord(n, rows=table.num_rows, path=name, size=len(data), stats=compute_statistics(table))], {})


def make_gallery(path: Path, count: int, faces: Faces | None = None) -> Gallery:
    """Make a gallery of `count` faces, in files of about 50,000."""
    gallery = Gallery.create(str(path), CONTRACT)
    drawn = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal drawn
        for identities, vectors in (faces or Faces()).blocks(count):
            yield rows(identities, vectors, drawn)
            drawn += len(vectors)

    append(gallery, tables(), "synthetic")
    return Gallery(str(path))


def main() -> None:
    """Make a gallery from the command line."""
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
