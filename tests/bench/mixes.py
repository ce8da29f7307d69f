"""Cluster galleries of many sizes and mixes of persons, and print the threshold found and the scores.

    python tests/bench/mixes.py [NAME ...] [--seed 1] [--lfw GALLERY] [--large] [--best] [--before TREE]

The mixes are drawn by `hard_faces.py`. Names with `easy` are of one quality, as the figures of earlier reports were;
`hard` ones are as hard as LFW. With `card` the gallery says that its model is dlib's; without, the model states no
threshold. --lfw adds a gallery of real faces and both halves of its identities. --large adds the mixes of 90,000 faces.
--best adds the BCubed F that the best of twelve thresholds would give. --before writes the table of docs/performance.md
instead: also with the code of commit 8b660ca, of which TREE is a checkout (`git worktree add TREE 8b660ca`).
"""
# ruff: noqa: E402

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

# The repository comes before tests/, which has a folder of the package's name.
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from bench.galleries import CONTRACT, append
from cleaning import select_faces
from hard_faces import (
    EASY,
    ArcFaceLike,
    DlibLike,
    DrawnFaces,
    add_large_person,
    draw_geometric,
    draw_uneven,
    draw_zipf,
    make_hard_gallery,
)

from facepipe.curation.clusters.identities import cluster_faces
from facepipe.curation.graph import Graph
from facepipe.curation.graph.clusters import Clusters
from facepipe.curation.graph.fitness import find_unfit_nodes
from facepipe.curation.graph.linkage import merge_by_average_linkage
from facepipe.errors import ThresholdError
from facepipe.evaluation.clusters import score_clusters
from facepipe.gallery import Contract, Gallery
from facepipe.nearest.join import find_candidate_pairs
from pipelines.graph import GraphConfig, GraphRunConfig, open_graph

CARD = Contract("synthetic", "0" * 64, "dlib-resnet", "0" * 64, "none", False)
_HALVES = 2


@dataclass(frozen=True)
class Mix:
    """A gallery to cluster.

    Attributes:
        draw: Draws the faces, from a seed.
        has_card: Whether the model states a threshold.
        is_large: Whether it takes minutes.
    """

    draw: Callable[[int], DrawnFaces]
    has_card: bool = False
    is_large: bool = False


def draw_dlib(
    person: np.ndarray, seed: int, *, easy: bool = False, relatives: int = 1, kinship: float = 0.0
) -> DrawnFaces:
    space = DlibLike(seed, EASY if easy else None)
    return space.draw(space.draw_centres(int(person.max()) + 1, relatives=relatives, kinship=kinship), person)


def draw_arc(person: np.ndarray, seed: int, *, easy: bool = False) -> DrawnFaces:
    space = ArcFaceLike(seed, hardness=EASY if easy else None)
    return space.draw(space.draw_centres(int(person.max()) + 1), person)


def draw_blurred(person: np.ndarray, seed: int, share: float) -> DrawnFaces:
    """Draw faces of which a share collapses on the direction of blurred ones; these are nobody's."""
    space = ArcFaceLike(seed)
    faces = space.draw(space.draw_centres(int(person.max()) + 1), person)
    is_blurred = np.random.default_rng(seed).random(len(faces)) < share
    blurred = space.blur(faces, is_blurred)
    alone = len(faces) + np.arange(len(faces))
    return DrawnFaces(np.where(is_blurred, alone, person), blurred.vectors, blurred.noise)


def draw_copies(seed: int) -> DrawnFaces:
    """Draw 50 pictures with 100 near copies each."""
    space = DlibLike(seed)
    faces = space.draw(space.draw_centres(50), np.arange(50)).take(np.repeat(np.arange(50), 100))
    vectors = faces.vectors + 1e-3 * np.random.default_rng(seed).standard_normal(faces.vectors.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return DrawnFaces(faces.person, vectors.astype(np.float32), faces.noise)


def list_mixes() -> dict[str, Mix]:
    """List the mixes by name."""
    mixes = {
        "hard geometric 10, 12k": Mix(lambda s: draw_dlib(draw_geometric(12_000, 10, s), s)),
        "hard geometric 3, 12k": Mix(lambda s: draw_dlib(draw_geometric(12_000, 3, s), s)),
        "hard geometric 1.8, 4k": Mix(lambda s: draw_dlib(draw_geometric(4_000, 1.8, s), s)),
        "easy geometric 10, 12k": Mix(lambda s: draw_dlib(draw_geometric(12_000, 10, s), s, easy=True)),
        "easy zipf 20k": Mix(lambda s: draw_dlib(draw_zipf(20_000, 3000, s), s, easy=True)),
        "easy zipf 20k, card": Mix(lambda s: draw_dlib(draw_zipf(20_000, 3000, s), s, easy=True), has_card=True),
        "hard zipf 20k, card": Mix(lambda s: draw_dlib(draw_zipf(20_000, 3000, s), s), has_card=True),
        "easy arc zipf 20k": Mix(lambda s: draw_arc(draw_zipf(20_000, 3000, s), s, easy=True)),
        "arc zipf 20k": Mix(lambda s: draw_arc(draw_zipf(20_000, 3000, s), s)),
        "arc geometric 10, 12k": Mix(lambda s: draw_arc(draw_geometric(12_000, 10, s), s)),
        "families of 4, 12k": Mix(lambda s: draw_dlib(draw_geometric(12_000, 10, s), s, relatives=4, kinship=0.4)),
        "blur 5 %, arc 12k": Mix(lambda s: draw_blurred(draw_geometric(12_000, 10, s), s, 0.05)),
        "strangers, 12k": Mix(lambda s: draw_dlib(np.arange(12_000), s)),
        "50 x 100 copies, card": Mix(draw_copies, has_card=True),
        "one of 3,000": Mix(lambda s: draw_dlib(np.zeros(3000, np.int64), s)),
        "one of 3,000, card": Mix(lambda s: draw_dlib(np.zeros(3000, np.int64), s), has_card=True),
        "two of 500, card": Mix(lambda s: draw_dlib(np.arange(1000) % 2, s), has_card=True),
        "two of 500, arc": Mix(lambda s: draw_arc(np.arange(1000) % 2, s)),
    }
    for share in (10, 15, 20, 50):
        mixes[f"easy one of {share} % of 6k"] = Mix(lambda s, share=share: draw_share(s, share, easy=True))  # type: ignore[misc]
        mixes[f"hard one of {share} % of 6k, card"] = Mix(
            lambda s, share=share: draw_share(s, share, easy=False),  # type: ignore[misc]
            has_card=True,
        )
    for persons in (30, 100, 300):
        mixes[f"arc {persons} persons, 5k"] = Mix(lambda s, k=persons: draw_arc(draw_uneven(5000, k, s), s))  # type: ignore[misc]
        mixes[f"easy arc {persons} persons, 5k"] = Mix(
            lambda s, k=persons: draw_arc(draw_uneven(5000, k, s), s, easy=True)  # type: ignore[misc]
        )
        mixes[f"hard {persons} persons, 5k, card"] = Mix(
            lambda s, k=persons: draw_dlib(draw_uneven(5000, k, s), s),  # type: ignore[misc]
            has_card=True,
        )
    for faces in (0, 2000, 5000):
        mixes[f"easy one of {faces} in 24k"] = Mix(lambda s, m=faces: draw_one_in(24_000, m, s))  # type: ignore[misc]
    for faces in (0, 2000, 5000, 10_000):
        mixes[f"easy one of {faces} in 90k"] = Mix(lambda s, m=faces: draw_one_in(90_000, m, s), is_large=True)  # type: ignore[misc]
    return mixes


def draw_share(seed: int, percent: int, *, easy: bool) -> DrawnFaces:
    """Draw 6,000 faces, of which one person has a share; the others have ten each."""
    large = 6000 * percent // 100
    return draw_dlib(add_large_person(draw_geometric(6000 - large, 10, seed), large), seed, easy=easy)


def draw_one_in(others: int, large: int, seed: int) -> DrawnFaces:
    """Draw faces of persons with three each, and one person with many."""
    return draw_dlib(add_large_person(draw_geometric(others, 3, seed), large), seed, easy=True)


def score(graph: Graph, found: np.ndarray, truth: dict[int, int], best: bool) -> str:
    """Write the figures of a clustering as cells of the table."""
    person = np.array([truth[face] for face in graph.nodes.ids.tolist()])
    s = score_clusters(person, found)
    source = "data" if graph.info.threshold.estimated else "card"
    line = f"{graph.info.distance:.3f} {source:>5} {s.clusters:6} of {s.identities:5}  {s.pairwise.f:.4f}   "
    line += f"{s.bcubed.precision:.3f} {s.bcubed.recall:.3f} {s.bcubed.f:.4f}"
    if best:
        line += f"   {max(find_best(graph, person)):.4f}"
    return line


def find_best(graph: Graph, person: np.ndarray) -> list[float]:
    """Score the clusters of twelve thresholds: BCubed F of each."""
    vectors = np.asarray(graph.nodes.vectors)
    sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 1500), replace=False)
    similarity = vectors[sample] @ vectors[sample].T
    similarity -= (graph.density[sample][:, None] + graph.density[sample]) / 2
    is_same = person[sample][:, None] == person[sample]
    np.fill_diagonal(is_same, False)
    scores = []
    for share in np.geomspace(0.002, 0.6, 12):
        threshold = float(np.quantile(similarity[is_same], share)) if is_same.any() else 1.0
        u, v = find_candidate_pairs(vectors, graph.density, threshold, 32)
        labels, _ = merge_by_average_linkage(Clusters.from_faces(vectors, graph.density), u, v, threshold)
        scores.append(score_clusters(person, labels).bcubed.f)
    return scores


def run_mix(faces: DrawnFaces, contract: Contract, *, best: bool) -> str:
    """Cluster drawn faces, and return the cells of the table."""
    with tempfile.TemporaryDirectory() as folder:
        gallery = make_hard_gallery(Path(folder) / "G", faces, contract)
        table = gallery.to_arrow(columns=["face_id", "identity"])
        names = [int(name.removeprefix("person")) for name in table["identity"].to_pylist()]
        truth = dict(zip(table["face_id"].to_pylist(), names, strict=True))
        return run_gallery(gallery, f"{folder}/graph", truth, best=best)


def run_gallery(gallery: Gallery, folder: str, truth: dict[int, int], *, best: bool) -> str:
    """Cluster a gallery, and return the cells of the table."""
    try:
        graph = open_graph([gallery], GraphConfig(), GraphRunConfig(runner="inline"), folder)
    except ThresholdError:
        return "refused: no threshold"
    return score(graph, cluster_faces(graph, unfit=find_unfit_nodes(gallery, graph.nodes))[0], truth, best)


def run_real(path: str, *, best: bool) -> None:
    """Cluster the largest faces of real photos, and each half of their identities."""
    with tempfile.TemporaryDirectory() as folder:
        for name, gallery, truth in list_real(path, folder):
            line = run_gallery(gallery, f"{folder}/graph of {name}", truth, best=best)
            print(f"{'real faces, ' + name:32} {line}", flush=True)


def list_real(path: str, folder: str) -> Iterator[tuple[str, Gallery, dict[int, int]]]:
    """Make galleries of the largest faces of real photos, and of each half of their identities, with the truth."""
    real = Gallery(path)
    table = select_faces(real, 1)
    names = np.unique(np.array(table["identity"].to_pylist()), return_inverse=True)[1]
    half = np.random.default_rng(0).random(int(names.max()) + 1) < 1 / _HALVES
    for name, chosen in (("whole", names >= 0), ("half 1", half[names]), ("half 2", ~half[names])):
        part = table.filter(pa.array(chosen))
        append(Gallery.create(f"{folder}/{name}", real.contract), [part], "real")
        truth = dict(zip(part["face_id"].to_pylist(), names[chosen].tolist(), strict=True))
        yield name, Gallery(f"{folder}/{name}"), truth


def list_rows(args: argparse.Namespace) -> Iterator[tuple[str, DrawnFaces, Contract]]:
    """List the chosen mixes, and real faces if there are any: name, faces and model."""
    for name, mix in list_mixes().items():
        if (not args.names or name in args.names) and (args.large or not mix.is_large):
            yield name, mix.draw(args.seed), CARD if mix.has_card else CONTRACT


def print_table(args: argparse.Namespace) -> None:
    """Print a row per mix: with the code of an older commit, and with this one."""
    print(f"{date.today()}, {os.cpu_count()} CPUs, Python {platform.python_version()}: {' '.join(sys.argv)}\n")
    print("| mix | before: threshold, clusters of persons, pairs F, BCubed P R F | now |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, faces, contract in list_rows(args):
            path = f"{folder}/faces.npz"
            np.savez(path, vectors=faces.vectors, person=faces.person, has_card=contract is CARD)
            before = run_before(args.before, path)
            # The columns of a line are apart by spaces only.
            now = run_mix(faces, contract, best=False)
            print(f"| {name} | {' '.join(before.split())} | {' '.join(now.split())} |", flush=True)
        for name, gallery, truth in list_real(args.lfw, folder) if args.lfw else ():
            ids, vectors = gallery.vectors()
            person = np.array([truth[face] for face in ids.tolist()])
            np.savez(f"{folder}/faces.npz", vectors=vectors, person=person, has_card=True)
            before = run_before(args.before, f"{folder}/faces.npz")
            now = run_gallery(gallery, f"{folder}/graph of {name}", truth, best=False)
            print(f"| real faces, {name} | {' '.join(before.split())} | {' '.join(now.split())} |", flush=True)


def run_before(tree: str, path: str) -> str:
    """Cluster the faces in a file with the code of a checkout of an older commit."""
    search_path = f"{tree}:{tree}/tests/bench"
    environment = {**os.environ, "PYTHONPATH": search_path, "PYTHONSAFEPATH": "1"}
    script = str(Path(__file__).with_name("mixes_before.py"))
    done = subprocess.run(
        [sys.executable, script, path], env=environment, capture_output=True, text=True, check=True, timeout=3600
    )
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lfw")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--before", metavar="TREE")
    args = parser.parse_args()
    if args.before:
        print_table(args)
        return
    head = f"{'mix':32} threshold   clusters of persons  pairs F  BCubed P R F"
    print(head + ("            best F" if args.best else ""))
    if args.lfw:
        run_real(args.lfw, best=args.best)
    for name, faces, contract in list_rows(args):
        line = run_mix(faces, contract, best=args.best)
        print(f"{name:32} {line}", flush=True)


if __name__ == "__main__":
    main()
