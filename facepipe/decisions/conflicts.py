"""Decisions that contradict each other, also through chains of faces that are one person."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from facepipe.decisions.resolve import MIN_OVERLAP, FaceKeys, compute_overlaps
from facepipe.decisions.schema import DIFFERENT_FROM, IGNORE, IS, IS_NOT, KEEP, NOT_A_FACE, SAME_AS
from facepipe.types import Bool, Int64

_MAX_CONFLICTS = 100


@dataclass(frozen=True)
class Conflict:
    """Decisions of which not all can be true.

    Attributes:
        rows: positions of the decisions, the ones that say the opposite first.
        reason: what they say.
    """

    rows: tuple[int, ...]
    reason: str


def find_conflicts(rows: pa.Table, most: int = _MAX_CONFLICTS, *, concerning: Bool | None = None) -> list[Conflict]:
    """Find decisions that contradict each other.

    Faces of equal id are one face, and so are faces of one image whose boxes overlap by half: the same photo may have
    several names. One person follows from `is` with the same name and from `same_as`, through chains of any length.

    Args:
        rows: active decisions, with the columns of the table.
        most: how many conflicts are returned at most.
        concerning: only conflicts with one of these rows, (n,); all by default.

    Returns:
        The conflicts. Each names as few decisions as show it.
    """
    graph = _Graph(rows)
    conflicts = []
    for conflict in graph.iterate_conflicts():
        if concerning is not None and not concerning[list(conflict.rows)].any():
            continue
        conflicts.append(conflict)
        if len(conflicts) == most:
            break
    return conflicts


class _Graph:
    """Faces and persons as nodes; what makes two of them one person as edges."""

    def __init__(self, rows: pa.Table):
        self.rows = rows
        keys = FaceKeys.from_rows(rows)
        others = FaceKeys.from_rows(rows, "other_")
        self.face_ids = np.unique(np.concatenate([keys.face_id, others.face_id]))
        self.first = np.searchsorted(self.face_ids, keys.face_id)
        self.other = np.searchsorted(self.face_ids, others.face_id)
        # Persons are numbered behind the faces.
        names = rows["person"].combine_chunks()
        self.persons = pc.unique(names.drop_null())
        person = pc.fill_null(pc.index_in(names, value_set=self.persons), -1).to_numpy(zero_copy_only=False)
        self.person = np.where(person >= 0, person + len(self.face_ids), -1).astype(np.int64)
        same = self._find(SAME_AS)
        confirmed = self._find(IS)
        content = _pair_contents(self.face_ids, keys, others)
        self.left = np.concatenate([self.first[same], self.first[confirmed], content[:, 0]])
        self.right = np.concatenate([self.other[same], self.person[confirmed], content[:, 1]])
        # Which row an edge is from; none for the same content.
        self.edge_row = np.concatenate([same, confirmed, np.full(len(content), -1, np.int64)])
        count = len(self.face_ids) + len(self.persons)
        edges = coo_matrix((np.ones(len(self.left), np.int8), (self.left, self.right)), shape=(count, count))
        self.components = connected_components(edges, directed=False)[1] if count else np.empty(0, np.int32)
        self._neighbours: dict[int, list[tuple[int, int]]] | None = None

    def _find(self, *kinds: str) -> Int64:
        is_kind = pc.is_in(self.rows["decision"], value_set=pa.array(kinds, pa.string()))
        return np.flatnonzero(is_kind.to_numpy(zero_copy_only=False))

    def iterate_conflicts(self) -> Iterator[Conflict]:
        yield from self._iterate_two_persons()
        for row in self._find(DIFFERENT_FROM).tolist():
            if self.components[self.first[row]] == self.components[self.other[row]]:
                path = self._find_path(int(self.first[row]), int(self.other[row]))
                reason = f"faces {self._name(self.first[row])} and {self._name(self.other[row])} are different persons"
                yield Conflict((row, *path), f"{reason}, and one person")
        for row in self._find(IS_NOT).tolist():
            if self.components[self.first[row]] == self.components[self.person[row]]:
                path = self._find_path(int(self.first[row]), int(self.person[row]))
                name = self._name(self.person[row])
                yield Conflict((row, *path), f"face {self._name(self.first[row])} is {name}, and is not")
        yield from self._iterate_opposites(NOT_A_FACE, (IS, SAME_AS, KEEP))
        yield from self._iterate_opposites(IGNORE, (KEEP,))

    def _iterate_two_persons(self) -> Iterator[Conflict]:
        """Find faces that are two persons."""
        nodes = np.arange(len(self.face_ids), len(self.face_ids) + len(self.persons))
        components = self.components[nodes]
        order = np.argsort(components, kind="stable")
        is_repeated = np.flatnonzero(components[order][1:] == components[order][:-1])
        for at in is_repeated.tolist():
            left = int(nodes[order[at]])
            right = int(nodes[order[at + 1]])
            path = self._find_path(left, right)
            faces = {int(self.first[row]) for row in path}
            subject = f"face {self._name(min(faces))} is" if len(faces) == 1 else "faces that are one person are"
            yield Conflict(tuple(path), f"{subject} {self._name(left)} and {self._name(right)}")

    def _iterate_opposites(self, kind: str, others: tuple[str, ...]) -> Iterator[Conflict]:
        """Find two decisions about one face that exclude each other."""
        rows = self._find(kind)
        if not len(rows):
            return
        pairs = set(self._find(SAME_AS).tolist())
        by_face: dict[int, int] = {}
        for row in self._find(*others).tolist():
            by_face.setdefault(int(self.first[row]), row)
            if row in pairs:
                by_face.setdefault(int(self.other[row]), row)
        for row in rows.tolist():
            opposite = by_face.get(int(self.first[row]))
            if opposite is not None:
                name = self._name(self.first[row])
                yield Conflict((row, opposite), f"face {name}: {kind}, and {self.rows['decision'][opposite].as_py()}")

    def _name(self, node: int) -> str:
        if node < len(self.face_ids):
            return str(self.face_ids[node])
        return repr(self.persons[int(node) - len(self.face_ids)].as_py())

    def _find_path(self, start: int, end: int) -> list[int]:
        """Find the fewest rows by which two nodes are one person."""
        neighbours = self._get_neighbours()
        came_from: dict[int, tuple[int, int]] = {start: (-1, -1)}
        waiting = deque([start])
        while waiting and end not in came_from:
            node = waiting.popleft()
            for other, row in neighbours.get(node, []):
                if other not in came_from:
                    came_from[other] = (node, row)
                    waiting.append(other)
        rows = []
        node = end
        while node != start:
            node, row = came_from[node]
            if row >= 0:
                rows.append(row)
        return rows[::-1]

    def _get_neighbours(self) -> dict[int, list[tuple[int, int]]]:
        if self._neighbours is None:
            self._neighbours = {}
            edges = zip(self.left.tolist(), self.right.tolist(), self.edge_row.tolist(), strict=True)
            for left, right, row in edges:
                self._neighbours.setdefault(left, []).append((right, row))
                self._neighbours.setdefault(right, []).append((left, row))
        return self._neighbours


def _pair_contents(face_ids: Int64, keys: FaceKeys, others: FaceKeys) -> Int64:
    """Find faces of one image whose boxes overlap: pairs (m, 2) of positions in `face_ids`."""
    ids = np.concatenate([keys.face_id, others.face_id])
    images = pa.concat_arrays([keys.image_id, others.image_id])
    boxes = np.concatenate([keys.box, others.box])
    # One row per id, and of these only images with several ids.
    _, positions = np.unique(ids, return_index=True)
    positions = positions[images.is_valid().to_numpy(zero_copy_only=False)[positions]]
    codes = images.take(pa.array(positions)).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1))
    pairs = [np.empty((0, 2), np.int64)]
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end - start < 2:
            continue
        members = positions[order[start:end]]
        left, right = np.triu_indices(len(members), 1)
        is_same = compute_overlaps(boxes[members[left]], boxes[members[right]]) >= MIN_OVERLAP
        pair = np.stack([ids[members[left[is_same]]], ids[members[right[is_same]]]], axis=1)
        pairs.append(np.searchsorted(face_ids, pair).astype(np.int64))
    return np.concatenate(pairs)
