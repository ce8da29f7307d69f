"""Assign new faces night after night, and compare the clusters with those that clustering anew gives.

    python tests/bench/assignment.py GALLERY [--start 0.1] [--nights 20] [--seeds 1] [--no-anew]

GALLERY holds labelled real faces (`facepipe embed lfw-dev/images GALLERY --identity folder`). A share of the photos is
clustered, the others come in equal parts. Per night: whether the gallery was clustered anew, and the share of the
newcomers' faces (of persons who had no face before) that joined a cluster of earlier faces, who are all strangers. At
the end: pairwise and BCubed F, beside those of clustering everything once. The last line is the first night of a
gallery whose clusters were made on 317 faces. --no-anew only assigns, as versions before did.
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

from facepipe.evaluation.clusters import score_clusters
from facepipe.gallery import Gallery
from pipelines.cluster import ClusterConfig, ClusterRules
from pipelines.cluster import run as cluster
from pipelines.cluster.assign import run as assign


class Nights:
    """A gallery that grows: photos of real persons in a random order."""

    def __init__(self, path: str, folder: Path, seed: int):
        source = Gallery(path)
        table = select_faces(source, 1)
        order = np.random.default_rng(seed).permutation(table.num_rows)
        self.table = table.take(pa.array(order))
        names = np.array(self.table["identity"].to_pylist())
        self.person = np.unique(names, return_inverse=True)[1]
        self.of_face = dict(zip(self.table["face_id"].to_pylist(), self.person.tolist(), strict=True))
        self.gallery = Gallery.create(str(folder / f"G{seed}"), source.contract).path
        self.count = 0

    def add(self, count: int) -> set[int]:
        """Add photos, and return the ids of the newcomers' faces."""
        part = self.table.slice(self.count, count)
        append(Gallery(self.gallery), [part], f"part{self.count}")
        known = set(self.person[: self.count].tolist())
        self.count += count
        return {face_id for face_id in part["face_id"].to_pylist() if self.of_face[face_id] not in known}

    def read(self) -> dict[int, int]:
        """Read the cluster of each face."""
        columns = ["face_id", "cluster"]
        table = pq.read_table(f"{self.gallery}/reports/cluster/faces.parquet", columns=columns)
        return dict(zip(table["face_id"].to_pylist(), table["cluster"].to_pylist(), strict=True))

    def score(self) -> tuple[float, float]:
        found = self.read()
        truth = np.array([self.of_face[face_id] for face_id in found])
        scores = score_clusters(truth, np.unique(list(found.values()), return_inverse=True)[1])
        return scores.pairwise.f, scores.bcubed.f


def run_night(nights: Nights, count: int, rules: ClusterRules) -> tuple[int, int, bool]:
    """Return the newcomers' faces, those of them that joined strangers, and whether all was clustered anew."""
    before = nights.read()
    newcomers = nights.add(count)
    summary = assign(nights.gallery, rules=rules)
    after = nights.read()
    earlier = {after[face_id] for face_id in before}
    joined = sum(after[face_id] in earlier for face_id in newcomers)
    return len(newcomers), joined, summary.anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery")
    parser.add_argument("--start", type=float, default=0.1)
    parser.add_argument("--nights", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no-anew", action="store_true")
    args = parser.parse_args()
    rules = ClusterRules(anew_faces=0 if args.no_anew else 1_000_000)
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            nights = Nights(args.gallery, Path(folder), seed)
            total = nights.table.num_rows
            nights.add(int(total * args.start))
            cluster(ClusterConfig(), nights.gallery)
            line = []
            newcomers = joined = 0
            for n in range(args.nights):
                count = (total - nights.count) // (args.nights - n)
                new, wrong, anew = run_night(nights, count, rules)
                newcomers += new
                joined += wrong
                line.append(f"{wrong}/{new}{'*' if anew else ''}")
            print(f"seed {seed}: newcomers with strangers per night (* anew): {' '.join(line)}")
            assigned = nights.score()
            cluster(ClusterConfig(), nights.gallery, keep_ids=True)
            whole = nights.score()
            print(
                f"  from {args.start:.0%} in {args.nights} nights: pairwise F {assigned[0]:.3f} (anew {whole[0]:.3f}), "
                f"BCubed F {assigned[1]:.3f} ({whole[1]:.3f}); newcomers with strangers {joined / newcomers:.3f}",
                flush=True,
            )
            few = Nights(args.gallery, Path(folder) / "few", seed)
            few.add(317)
            cluster(ClusterConfig(), few.gallery)
            new, wrong, anew = run_night(few, 348, rules)
            print(f"  348 faces to 317: newcomers with strangers {wrong / new:.3f}; anew: {anew}", flush=True)


if __name__ == "__main__":
    main()
