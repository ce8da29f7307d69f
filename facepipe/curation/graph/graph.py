"""A finished graph in a folder: nodes, densities, the cohort, edges, and what was measured when it was made."""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.edges import Edges
from facepipe.curation.graph.nodes import Nodes, open_nodes
from facepipe.curation.graph.threshold import Threshold
from facepipe.errors import StorageError
from facepipe.nearest.similarity import Pairs, compute_similarity
from facepipe.storage import replace_file
from facepipe.types import Float32, Int64

INFO = "graph.json"
DENSITY, COHORT, HISTOGRAM, REPRESENTATIVES = "density.npy", "cohort.npy", "histogram.npy", "representatives.npy"


@dataclass(frozen=True)
class GraphInfo:
    """What a graph is of, and how good it is.

    galleries, versions: the tables, by id; settings: all that decided it; threshold: similarity of an edge at least;
    recall: share of the edges that comparing all faces finds for a sample of faces; sampled: edges of that sample;
    exact: every face was compared with every other
    """

    galleries: tuple[str, ...]
    versions: tuple[int, ...]
    settings: str
    faces: int
    edges: int
    cells: int
    each: int
    most: int
    exact: bool
    threshold: Threshold
    mean_density: float
    recall: float
    sampled: int
    seconds: float

    @property
    def distance(self) -> float:
        """The threshold as the Euclidean distance at which it lies for two faces of mean density."""
        return self.distance_at(self.threshold.similarity)

    def distance_at(self, value: float) -> float:
        """A similarity as the Euclidean distance of two faces of mean density."""
        return float(np.sqrt(max(0.0, 2 - 2 * (value + self.mean_density))))


class Graph:
    """Opened read-only; positions of nodes are what everything built on it speaks of."""

    def __init__(self, folder: str):
        self.folder = folder
        self.info = read_info(folder)
        self.nodes: Nodes = open_nodes(folder)
        self.edges = Edges(folder)

    @cached_property
    def density(self) -> Float32:
        """(n,) how crowded the space around each face is."""
        return np.asarray(self._array(DENSITY), np.float32)

    @cached_property
    def cohort(self) -> Cohort:
        """What densities were computed with, for faces that come later."""
        return Cohort(self._array(COHORT))

    @cached_property
    def representatives(self) -> Int64:
        """(n,) the first node with the same vector, bit by bit."""
        return np.asarray(self._array(REPRESENTATIVES), np.int64)

    @cached_property
    def histogram(self) -> Int64:
        """Counts of similarities of random pairs, in bins of facepipe.curation.graph.threshold.EDGES."""
        return np.asarray(self._array(HISTOGRAM), np.int64)

    def _array(self, name: str) -> Any:
        try:
            return np.load(os.path.join(self.folder, name))
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"the graph in {self.folder!r} is damaged ({name}): delete the folder") from error

    def compute_similarity(self, pairs: Pairs) -> Float32:
        """(m,) similarities of edges."""
        return compute_similarity(pairs.distance, self.density[pairs.u], self.density[pairs.v])


def read_info(folder: str) -> GraphInfo:
    """What the graph in a folder is of."""
    try:
        with open(os.path.join(folder, INFO), encoding="utf-8") as file:
            found = json.load(file)
        found["threshold"] = Threshold(**found["threshold"])
        return GraphInfo(**{**found, "galleries": tuple(found["galleries"]), "versions": tuple(found["versions"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"no graph in {folder!r}: {error}") from error


def write_info(folder: str, info: GraphInfo) -> None:
    """Write what makes the folder a finished graph."""
    path = os.path.join(folder, INFO)
    with replace_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(asdict(info), file, indent=1)
