"""Judge the same photos in the spaces of several models: distance of one person, clusters, and clean with flipped labels.

    python tests/bench/spaces.py GALLERY ... --pairs lfw-dev/pairs.txt [--seeds 1] [--distances 1.03 1.07]

Each GALLERY has the faces of the same photos by another model, such as `facepipe migrate` makes, and the true labels.
Per gallery are printed:

- pairs: accuracy, TAR at FAR 1e-3, and the distance of the highest accuracy on PAIRS;
- same person: the distance that `facepipe models measure` finds, with labels and without, with its range, and the
  accuracy on PAIRS at it;
- cluster: the threshold, where it is from, clusters, and pairwise and BCubed precision, recall and F, also at the
  distances that are given;
- clean: identities of four photos and more, of whose labels 20 % are exchanged: what is found and repaired, and wrong
  decisions beside the number that `clean` expects.
"""
# ruff: noqa: E402

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

# The repository comes before tests/, which has a folder of the package's name.
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from bench.clean_mixes import load_real, renumber, run_corpus
from bench.galleries import CONTRACT
from hard_faces import DrawnFaces, swap_labels

from facepipe.config import build
from facepipe.curation.graph.graph import Graph
from facepipe.evaluation.clusters import evaluate_clusters
from facepipe.evaluation.model_limits import SamePersonEstimate, estimate_same_person
from facepipe.evaluation.pairs import evaluate_pairs
from facepipe.evaluation.pairs_file import read_pairs
from facepipe.gallery import Gallery
from pipelines.cluster import ClusterConfig, run
from pipelines.measure import MeasureConfig, _choose_faces


def print_same_person(gallery: Gallery, pairs: Path) -> None:
    """Print what is found for one person, and how well it tells the pairs apart."""
    ids, persons = _choose_faces(gallery, MeasureConfig())
    all_ids, vectors = gallery.vectors()
    order = np.argsort(all_ids)
    chosen = vectors[order[np.searchsorted(all_ids, ids, sorter=order)]]
    for title, known in (("labels", persons), ("no labels", None)):
        found = estimate_same_person(chosen, known)
        print(f"  same person, {title}: {describe(found)}, accuracy {measure_accuracy(gallery, pairs, found):.4f}")


def describe(found: SamePersonEstimate) -> str:
    return f"{found.distance:.3f} ({found.low:.3f} to {found.high:.3f})"


def measure_accuracy(gallery: Gallery, pairs: Path, found: SamePersonEstimate) -> float:
    """Measure the share of pairs that a distance tells right."""
    table = gallery.to_arrow(["uri", "embedding"], where="face_id is not null and face_index = 0")
    names = ["/".join(uri.split("/")[-2:]).removesuffix(".jpg") for uri in table["uri"].to_pylist()]
    vectors = dict(zip(names, np.stack(table["embedding"].to_pylist()), strict=True))
    listed = read_pairs(pairs)
    distances = np.array([np.linalg.norm(vectors[pair.left] - vectors[pair.right]) for pair in listed])
    return float(((distances <= found.distance) == np.array([pair.same for pair in listed])).mean())


def print_clusters(gallery: Gallery, distances: list[float]) -> None:
    """Print what is clustered at the threshold that is found, and at some distances."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/g"
        shutil.copytree(gallery.path, path)
        for distance in (None, *distances):
            print(f"  cluster: {cluster(path, distance)}", flush=True)


def cluster(path: str, threshold: float | None) -> str:
    """Cluster a gallery, and describe the result."""
    settings = {"run": {"runner": "inline"}}
    if threshold is not None:
        settings["graph"] = {"threshold": threshold}
    run(build(ClusterConfig, settings), path)
    info = Graph(f"{path}/reports/graph").info
    found = evaluate_clusters(Gallery(path)).to_dict()
    p = found["pairwise"]
    b = found["bcubed"]
    return (
        f"{info.distance:.3f} {'data' if info.threshold.estimated else 'given or card'}, {found['clusters']} clusters, "
        f"pairs {p['precision']:.3f} {p['recall']:.3f} {p['f']:.4f}, "
        f"BCubed {b['precision']:.3f} {b['recall']:.3f} {b['f']:.4f}"
    )


def print_clean(gallery: Gallery, seeds: int) -> None:
    """Print how labels are judged of which 20 % are wrong, by a model without a card."""
    faces: DrawnFaces = load_real(gallery.path)
    many = np.bincount(faces.person)[faces.person] >= 4
    kept = renumber(faces.take(many))
    print(
        "  clean: names  wrong  found  relabelled of   prec.   lost   kept review  wrong expected unverified errors expected"
    )
    for seed in range(1, seeds + 1):
        print(f"  seed {seed} {run_corpus(swap_labels(kept, 0.2, seed), CONTRACT, bins=seed == 1)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("galleries", nargs="+")
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--distances", type=float, nargs="*", default=[])
    arguments = parser.parse_args()
    for path in arguments.galleries:
        gallery = Gallery(path)
        found = evaluate_pairs(gallery, arguments.pairs)
        print(
            f"{gallery.contract.embedder}: accuracy {found.accuracy:.4f}, TAR {found.tar['0.001']:.4f}, "
            f"best distance {found.threshold:.3f}",
            flush=True,
        )
        print_same_person(gallery, arguments.pairs)
        print_clean(gallery, arguments.seeds)
        print_clusters(gallery, arguments.distances)


if __name__ == "__main__":
    main()
