"""A finished graph in a folder: nodes, densities, the cohort, edges, and what was measured when it was built."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from facepipe.curation.graph.cohort import Cohort
from facepipe.curation.graph.edges import Edges, spill_ends
from facepipe.curation.graph.nodes import Nodes, open_nodes
from facepipe.curation.graph.threshold import Threshold
from facepipe.errors import StorageError
from facepipe.nearest.similarity import Pairs, compute_similarity
from facepipe.storage import replace_file
from facepipe.types import Float32, Float64, Int32, Int64

INFO = "graph.json"
DENSITY = "density.npy"
COHORT = "cohort.npy"
HISTOGRAM = "histogram.npy"
IMPOSTORS = "impostors.npy"
REPRESENTATIVES = "representatives.npy"


@dataclass(frozen=True)
class GraphSource:
    """What a graph is built from: another source needs another graph.

    Attributes:
        galleries: Ids of the galleries.
        versions: Versions of their tables.
        settings: All settings that decide the graph, as JSON.
    """

    galleries: tuple[str, ...]
    versions: tuple[int, ...]
    settings: str


@dataclass(frozen=True)
class GraphInfo:
    """What a graph is built from, and how good it is. Stored as JSON.

    Attributes:
        galleries: Ids of the galleries.
        versions: Versions of their tables.
        settings: All settings that decided the graph, as JSON.
        faces: Nodes.
        edges: Edges.
        cells: Cells that faces were compared in.
        each: Cells per face.
        most: Neighbours per face in a crowded cell.
        exact: Whether every face was compared with every other.
        threshold: Similarity of an edge at least.
        mean_density: Mean density of the faces.
        recall: Share of the true edges of a sample of faces that the graph holds.
        sampled: True edges of that sample.
        seconds: Wall clock.
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
    def source(self) -> GraphSource:
        """What the graph is built from."""
        return GraphSource(self.galleries, self.versions, self.settings)

    @property
    def distance(self) -> float:
        """The threshold as the Euclidean distance of two faces of mean density."""
        return self.to_distance(self.threshold.similarity)

    def to_distance(self, similarity: float) -> float:
        """Convert a similarity to the Euclidean distance of two faces of mean density."""
        # similarity = 1 - distance^2 / 2 - mean density, solved for the distance.
        return float(np.sqrt(max(0.0, 2 - 2 * (similarity + self.mean_density))))


class Graph:
    """A graph, opened read-only. Faces are given by their positions in the nodes.

    Attributes:
        folder: Path.
        info: What it is built from, and how good it is.
        nodes: Faces.
        edges: Pairs of near faces.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.info = read_info(folder)
        self.nodes: Nodes = open_nodes(folder)
        self.edges = Edges(folder)

    @cached_property
    def density(self) -> Float32:
        """Densities (n,): how crowded the space around each face is."""
        return np.asarray(self._load(DENSITY), np.float32)

    @cached_property
    def cohort(self) -> Cohort:
        """The cohort that densities were computed with, for faces that are added later."""
        return Cohort(self._load(COHORT))

    @cached_property
    def representatives(self) -> Int64:
        """Positions (n,) of the first node with the same vector, bit by bit."""
        return np.asarray(self._load(REPRESENTATIVES), np.int64)

    @cached_property
    def histogram(self) -> Int64:
        """Counts of similarities of random pairs, in bins of facepipe.curation.graph.threshold.BIN_EDGES."""
        return np.asarray(self._load(HISTOGRAM), np.int64)

    @cached_property
    def impostors(self) -> Float64:
        """Expected share (3000,) of strangers among a face's neighbours, by threshold; empty if it is not known."""
        # Graphs of earlier versions have no such file.
        if not os.path.exists(os.path.join(self.folder, IMPOSTORS)):
            return np.empty(0)
        return np.asarray(self._load(IMPOSTORS), np.float64)

    def _load(self, name: str) -> Any:
        try:
            return np.load(os.path.join(self.folder, name))
        except (OSError, ValueError, EOFError) as error:
            raise StorageError(f"the graph in {self.folder!r} is damaged ({name}): delete the folder") from error

    def compute_similarity(self, pairs: Pairs) -> Float32:
        """Compute the similarities (m,) of edges."""
        return compute_similarity(pairs.distance, self.density[pairs.u], self.density[pairs.v])

    def read_similar_pairs(self, threshold: float) -> tuple[Int32, Int32]:
        """Read the edges whose similarity reaches a threshold into temporary files, a part at a time.

        Returns:
            One node of each edge, (m,), and the other, (m,).
        """
        blocks = ((pairs.u.astype(np.int32), pairs.v.astype(np.int32)) for pairs in self.read_parts(threshold))
        return spill_ends(blocks, len(self.edges))

    def read_parts(self, threshold: float) -> Iterator[Pairs]:
        """Read the edges whose similarity reaches a threshold, some hundred thousand at a time."""
        for pairs in self.edges:
            yield pairs.take(self.compute_similarity(pairs) >= threshold)


def read_info(folder: str) -> GraphInfo:
    """Read what the graph in a folder is built from.

    Raises:
        StorageError: there is no finished graph.
    """
    try:
        with open(os.path.join(folder, INFO), encoding="utf-8") as file:
            values = json.load(file)
        # JSON knows neither the class of the threshold nor tuples.
        values["threshold"] = Threshold(**values["threshold"])
        values["galleries"] = tuple(values["galleries"])
        values["versions"] = tuple(values["versions"])
        return GraphInfo(**values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StorageError(f"no graph in {folder!r}: {error}") from error


def write_info(folder: str, info: GraphInfo) -> None:
    """Write the file that makes the folder a finished graph."""
    # Replace the file in one step, because it makes the graph count as finished.
    path = os.path.join(folder, INFO)
    with replace_file(path) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
        json.dump(asdict(info), file, indent=1)
