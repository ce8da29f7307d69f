"""Measure which pairs of identities are named as one person: between two galleries, and under two names in one.

    python tests/bench/identity_pairs.py GALLERY [--seeds 2]

GALLERY holds labelled real faces (`facepipe embed lfw-dev/images GALLERY --identity folder`). The truth is made from
its names: persons are put on both sides under other names, split into two names, or joined under one. Per mix:
persons to find, pairs named, of these right, what their probabilities add up to, look-alikes, and identities of one
gallery that `data.exclude` would drop although they are not in the other. `regions` counts the false names by cluster
of the embedding space: strangers are the more alike, the denser a region is.
"""
# ruff: noqa: E402

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from bench.galleries import append
from cleaning import select_faces

from facepipe.arrow import to_vectors
from facepipe.gallery import Gallery
from facepipe.nearest.faiss_engine import faiss
from pipelines.clean import CleanConfig
from pipelines.clean import run as clean
from pipelines.dedup import DedupConfig
from pipelines.dedup import run as dedup

_REGIONS = 8
# Persons of LFW who have two names, or a picture under two.
_TWO_NAMES = (
    ("Chyung_Dai-chul", "Dai_Chul_Chyung"),
    ("Cristina_Fernandez", "Cristina_Kirchner"),
    ("Gabrielle_Rose", "Martha_Bowen"),
    ("Hasan_Wirayuda", "Hassan_Wirajuda"),
)


def make_gallery(path: Path, table: pa.Table, names: np.ndarray, contract: object) -> Gallery:
    """Make a gallery of rows under other names."""
    at = table.schema.get_field_index("identity")
    table = table.set_column(at, table.schema.field(at), pa.array(names.tolist(), pa.string()))
    append(Gallery.create(str(path), contract), [table], "rows")
    return Gallery(str(path))


class Corpus:
    """The largest face of each photo of a gallery, with the region of the embedding space that each person is in."""

    def __init__(self, path: str):
        gallery = Gallery(path)
        self.contract = gallery.contract
        self.table = select_faces(gallery, 1)
        names = np.array(self.table["identity"].to_pylist())
        self.names, self.person = np.unique(names, return_inverse=True)
        self.size = np.bincount(self.person)
        number = {name: n for n, name in enumerate(self.names)}
        known = [(number[a], number[b]) for a, b in _TWO_NAMES if a in number and b in number]
        self.doubles = {pair for a, b in known for pair in ((a, b), (b, a))}
        vectors = to_vectors(self.table["embedding"], 128)
        means = np.zeros((len(self.names), 128), np.float32)
        np.add.at(means, self.person, vectors)
        means /= np.maximum(1e-9, np.linalg.norm(means, axis=1, keepdims=True))
        clusters = faiss.Kmeans(128, _REGIONS, niter=20, seed=1, verbose=False)
        clusters.train(means)
        self.region = clusters.index.search(means, 1)[1][:, 0]
        self.density = np.array([np.sort(means @ mean)[-21:-1].mean() for mean in means])

    def take(self, chosen: np.ndarray) -> pa.Table:
        return self.table.take(pa.array(chosen))


def compare_sides(corpus: Corpus, shared: int, persons: tuple[int, int], seed: int) -> tuple[str, list[int]]:
    """Put some persons on both sides, half of their photos each and another name on the second one."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(corpus.names))
    both = order[corpus.size[order] >= 2][:shared]
    rest = order[~np.isin(order, both)]
    here = np.concatenate([both, rest[: persons[0] - shared]])
    there = np.concatenate([both, rest[persons[0] - shared :][: persons[1] - shared]])
    rank = rng.random(len(corpus.person))
    half = np.zeros(len(corpus.person), bool)
    for person in both:
        at = np.flatnonzero(corpus.person == person)
        half[at[np.argsort(rank[at])[: len(at) // 2]]] = True
    is_both = np.isin(corpus.person, both)
    left = np.flatnonzero(np.isin(corpus.person, here) & ~(is_both & half))
    right = np.flatnonzero(np.isin(corpus.person, there) & ~(is_both & ~half))
    with tempfile.TemporaryDirectory() as folder:
        one = make_gallery(Path(folder) / "A", corpus.take(left), corpus.names[corpus.person[left]], corpus.contract)
        names = np.array([f"other {n}" for n in corpus.person[right]])
        other = make_gallery(Path(folder) / "B", corpus.take(right), names, corpus.contract)
        summary = dedup(DedupConfig(), one.path, other.path)
        found = pq.read_table(f"{summary.out}/identities.parquet").to_pylist()
    number = {name: n for n, name in enumerate(corpus.names)}
    pairs = [(number[row["identity_0"]], int(row["identity_1"].split()[1])) for row in found]
    right_pairs = [a == b or (a, b) in corpus.doubles for a, b in pairs]
    false = [a for (a, _), is_right in zip(pairs, right_pairs, strict=True) if not is_right]
    lost = len(set(false) - set(there.tolist()))
    expected = sum(row["probability"] for row in found)
    return (
        f"{len(both):6} {len(pairs):6} {sum(right_pairs):6} {expected:9.1f} {summary.look_alikes:7} {lost:8}",
        false,
    )


def split_and_join(corpus: Corpus, splits: int, joins: int, seed: int) -> tuple[str, list[int]]:
    """Give some persons two names, and some pairs of persons one."""
    rng = np.random.default_rng(seed)
    many = rng.permutation(np.flatnonzero(corpus.size >= 2))
    label = corpus.person.copy()
    truth = set()
    for n, person in enumerate(many[:splits]):
        at = rng.permutation(np.flatnonzero(corpus.person == person))
        label[at[: rng.integers(1, len(at))]] = len(corpus.names) + n
        truth.add((int(person), len(corpus.names) + n))
    joined = many[splits : splits + 2 * joins].reshape(-1, 2)
    for first, second in joined:
        label[label == second] = first
    with tempfile.TemporaryDirectory() as folder:
        names = np.array([f"name {n}" for n in label])
        gallery = make_gallery(Path(folder) / "A", corpus.table, names, corpus.contract)
        clean(CleanConfig(), gallery.path)
        report = Path(folder) / "A" / "reports" / "clean"
        merges = pq.read_table(report / "merges.parquet").to_pylist()
        alike = pq.read_metadata(report / "look_alikes.parquet").num_rows
        table = pq.read_table(report / "identities.parquet").to_pylist()
    pairs = [tuple(sorted(int(row[end].split()[1]) for end in ("left", "right"))) for row in merges]
    right = [pair in truth or pair in corpus.doubles for pair in pairs]
    false = [pair[0] for pair, is_right in zip(pairs, right, strict=True) if not is_right]
    split = [int(row["identity"].split()[1]) for row in table if row["apart"] > 0]
    mixed = set(joined[:, 0].tolist())
    expected = sum(row["probability"] for row in merges)
    line = f"{len(truth):6} {len(pairs):6} {sum(right):6} {expected:9.1f} {alike:7} "
    line += f"  two persons, one name: {len(mixed)}, named {len(split)}, right {len(mixed & set(split))}"
    return line, [person if person < len(corpus.names) else int(many[person - len(corpus.names)]) for person in false]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    corpus = Corpus(args.gallery)
    count = len(corpus.names)
    false: list[int] = []
    print(f"{'mix':36}  truth  named  right  expected  alikes  dropped")
    for seed in range(args.seeds):
        for shared, here, there in ((8, count // 4, 40), (0, count // 2, count // 2), (60, count // 2, count // 2)):
            line, wrong = compare_sides(corpus, shared, (here, there), seed)
            print(f"{f'{here} against {there}, {shared} in both':36} {line}", flush=True)
            false += wrong
        for splits, joins in ((0, 0), (30, 30), (150, 0)):
            line, wrong = split_and_join(corpus, splits, joins, seed)
            print(f"{f'{splits} split, {joins} joined':36} {line}", flush=True)
            false += wrong
    print("\nregion  persons  density  false names")
    for region in np.argsort([-corpus.density[corpus.region == n].mean() for n in range(_REGIONS)]):
        inside = corpus.region == region
        wrong_count = sum(1 for person in false if corpus.region[person] == region)
        print(f"{region:6} {inside.sum():8} {corpus.density[inside].mean():8.3f} {wrong_count:12}")


if __name__ == "__main__":
    main()
