"""Cluster a gallery with the code of commit 8b660ca, and print the scores. `mixes.py --before` runs it.

    PYTHONSAFEPATH=1 PYTHONPATH=TREE:TREE/tests/bench python tests/bench/mixes_before.py FACES.npz

TREE is a checkout of that commit (`git worktree add TREE 8b660ca`). The file holds vectors, persons, and whether the
model states a threshold. Names of that commit are not those of today, so that its modules are imported by name.
"""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def load(module: str) -> Any:
    """Import a module of the older commit."""
    return importlib.import_module(module)


def main() -> None:
    faces = np.load(sys.argv[1])
    person = faces["person"]
    galleries = load("galleries")
    gallery_module = load("facepipe.gallery")
    graphs = load("pipelines.graph")
    embedder = "dlib-resnet" if faces["has_card"] else "synthetic"
    contract = gallery_module.Contract("synthetic", "0" * 64, embedder, "0" * 64, "none", False)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "G")
        table = galleries.rows(person, faces["vectors"], 0)
        galleries.append(gallery_module.Gallery.create(path, contract), [table], "hard")
        gallery = gallery_module.Gallery(path)
        truth = dict(zip(table["face_id"].to_pylist(), person.tolist(), strict=True))
        run = graphs.GraphRunConfig(runner="inline")
        try:
            graph = graphs.open_graph([gallery], graphs.GraphConfig(), run, f"{folder}/graph")
        except load("facepipe.errors").FacepipeError:
            print("refused: no threshold")
            return
        labels = load("facepipe.clusters.identities").cluster(graph, "linkage")[0]
        known = np.array([truth[face] for face in graph.nodes.ids.tolist()])
        scores = load("facepipe.evaluation.clusters").compare(known, labels)
        source = "data" if graph.info.threshold.estimated else "card"
        print(
            f"{graph.info.distance:.3f} {source} {scores.clusters} of {scores.identities} {scores.pairwise.f:.4f} "
            f"{scores.bcubed.precision:.3f} {scores.bcubed.recall:.3f} {scores.bcubed.f:.4f}"
        )


if __name__ == "__main__":
    main()
