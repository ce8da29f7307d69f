"""The near faces that labels are judged by. They are read from the graph in parts, as often as they are needed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from facepipe.curation.graph import Graph
from facepipe.nearest.similarity import Pairs
from facepipe.types import Float32, Int64


@dataclass(frozen=True)
class NearFaces:
    """The pairs of n faces that are as similar as one person's, in parts.

    Attributes:
        graph: The face graph.
    """

    graph: Graph

    def __iter__(self) -> Iterator[Pairs]:
        return self.graph.read_parts(self.graph.info.threshold.similarity)


@dataclass(frozen=True)
class NearVoters:
    """The same pairs between the faces that vote, in parts. A pair may come more than once.

    A copy has the neighbours of the face that it equals, so that pairs of copies are added. One copy of each face is
    enough: what matters is the labels around it.

    Attributes:
        near: Pairs of faces.
        voter: The face that votes for each face, (n,).
        last_copy: A copy of each face, (n,); the face itself if it has none.
    """

    near: NearFaces
    voter: Int64
    last_copy: Int64

    @classmethod
    def make(cls, near: NearFaces, copies: Int64, voter: Int64) -> "NearVoters":
        """Make it for the first face (n,) that each face equals, and the face (n,) that votes for it."""
        last_copy = np.arange(len(copies))
        later = np.flatnonzero(copies != last_copy)
        last_copy[copies[later]] = later
        return cls(near, voter, last_copy)

    def __iter__(self) -> Iterator[Pairs]:
        for pairs in self.near:
            u = self.last_copy[pairs.u]
            v = self.last_copy[pairs.v]
            has_copy = (u != pairs.u) | (v != pairs.v)
            yield self._move(
                np.concatenate([pairs.u, u[has_copy]]),
                np.concatenate([pairs.v, v[has_copy]]),
                np.concatenate([pairs.distance, pairs.distance[has_copy]]),
            )

    def _move(self, u: Int64, v: Int64, distance: Float32) -> Pairs:
        """Move the ends of pairs to the faces that vote."""
        left = self.voter[u]
        right = self.voter[v]
        return Pairs(np.minimum(left, right), np.maximum(left, right), distance).take(left != right)
