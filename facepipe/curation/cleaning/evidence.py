"""Measure how well each face fits the identities it may belong to: its own label's and its neighbours'."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from facepipe.curation.graph.grouped_sums import BLOCK_ROWS, add_pieces, iterate_pieces
from facepipe.nearest.similarity import Pairs
from facepipe.sorted_lookup import is_in_sorted
from facepipe.storage.mapped import TemporaryColumn, copy_column, make_temporary_array
from facepipe.storage.partitions import PartitionedTable, count_partitions
from facepipe.types import Bool, Float32, Int32, Int64

_BLOCK = BLOCK_ROWS
_PAIRS_PER_BLOCK = 1 << 16  # candidates that are judged at a time: some 10 MB
_NEIGHBOURS_PER_FACE = 4  # about, by which the ranges of faces are chosen
_NEIGHBOURS = pa.schema([("key", pa.int64())])
_MIN_SHARE = np.float32(1e-3)  # a smaller share counts as none


@dataclass(frozen=True)
class LabelCandidates:
    """Pairs of a face and an identity that it may belong to, sorted by face.

    Attributes:
        face: Position of the face, (m,).
        identity: Number of the identity, (m,).
        is_own: Whether the identity is the face's own label, (m,).
        identity_count: Number of identities.
        is_near: Whether the identity is near the face, (m,): it would be a candidate if it were not the label. By
            default all are.
        is_certain: Whether people have confirmed the candidate, (m,). By default none is certain. A face with a certain
            one has no other.
    """

    face: Int64
    identity: Int64
    is_own: Bool
    identity_count: int
    is_near: Bool | None = None
    is_certain: Bool | None = None

    def __len__(self) -> int:
        return len(self.face)

    def settle(self, probability: Float32, no_identity: Float32) -> tuple[Float32, Float32]:
        """Replace the probabilities (m,) of certain candidates by 1, and that of no identity at all (n,) by 0."""
        if self.is_certain is None or not self.is_certain.any():
            return probability, no_identity
        certain = self.face[self.is_certain]
        settled = no_identity.copy()
        settled[certain] = 0
        return np.where(self.is_certain, np.float32(1), probability).astype(np.float32), settled

    @cached_property
    def by_identity(self) -> Int32 | Int64:
        """Positions (m,) of the pairs, sorted by identity."""
        dtype = np.int32 if len(self) < np.iinfo(np.int32).max else np.int64
        order = make_temporary_array(dtype, (len(self),))
        # Where the next pair of each identity goes, (k,).
        place = np.cumsum(self.pair_counts) - self.pair_counts
        for at in range(0, len(self), _PAIRS_PER_BLOCK):
            identity = self.identity[at : at + _PAIRS_PER_BLOCK]
            own = np.argsort(identity, kind="stable")
            ordered = identity[own]
            begins = np.flatnonzero(np.diff(ordered, prepend=-1))
            counts = np.diff(begins, append=len(ordered))
            order[place[ordered] + np.arange(len(ordered)) - np.repeat(begins, counts)] = own + at
            place[ordered[begins]] += counts
        return order

    @cached_property
    def pair_counts(self) -> Int64:
        """Number of pairs of each identity, (k,)."""
        return np.bincount(self.identity, minlength=self.identity_count)

    @cached_property
    def own(self) -> Int64:
        """Positions of the pairs of labels, in a temporary file."""
        return self.select(lambda block: block.candidates.is_own)

    @cached_property
    def label_counts(self) -> Int64:
        """Number of faces that have the name of each identity, (k,)."""
        counts = np.zeros(self.identity_count, np.int64)
        for at in range(0, len(self), _PAIRS_PER_BLOCK):
            own = self.is_own[at : at + _PAIRS_PER_BLOCK]
            np.add.at(counts, self.identity[at : at + _PAIRS_PER_BLOCK][own], 1)
        return counts

    def iterate_blocks(self, face_count: int) -> "Iterator[FaceBlock]":
        """Cut the faces 0 to `face_count` into blocks with some of the pairs each. Nothing depends on where it is."""
        first = 0
        while first < face_count:
            last = min(first + _PAIRS_PER_BLOCK, face_count)
            begin, end = np.searchsorted(self.face, (first, last)).tolist()
            if end - begin > _PAIRS_PER_BLOCK:
                # As many whole faces as have so many pairs, and one at least.
                last = max(first + 1, int(self.face[begin + _PAIRS_PER_BLOCK]))
                end = int(np.searchsorted(self.face, last))
            pairs = slice(begin, end)
            yield FaceBlock(slice(first, last), pairs, self._cut(pairs, first))
            first = last

    def select(self, is_chosen: "Callable[[FaceBlock], Bool]") -> Int64:
        """Select pairs by a function of a block, which says of each of its pairs whether it is chosen.

        Returns:
            Positions (c,), in a temporary file.
        """
        face_count = int(self.face[-1]) + 1 if len(self) else 0
        positions = TemporaryColumn(np.int64, len(self))
        for block in self.iterate_blocks(face_count):
            positions.append(block.pairs.start + np.flatnonzero(is_chosen(block)))
        return positions.array

    def take(self, pairs: Int64) -> "LabelCandidates":
        """Copy some pairs (c,), by position, into temporary files."""
        return LabelCandidates(
            copy_column(self.face, pairs),
            copy_column(self.identity, pairs),
            copy_column(self.is_own, pairs),
            self.identity_count,
            None if self.is_near is None else copy_column(self.is_near, pairs),
            None if self.is_certain is None else copy_column(self.is_certain, pairs),
        )

    def keep_labels(self, probability: Float32, labelled: Float32 | None = None) -> Float32:
        """Keep the probabilities (m,) of the labels, and set those of other candidates to 0.

        Args:
            probability: probability of each pair, (m,).
            labelled: room for the result, (m,); by default in a temporary file.
        """
        if labelled is None:
            labelled = make_temporary_array(np.float32, (len(self),))
        for at in range(0, len(self), _PAIRS_PER_BLOCK):
            block = slice(at, at + _PAIRS_PER_BLOCK)
            labelled[block] = np.where(self.is_own[block], probability[block], np.float32(0))
        return labelled

    def find(self, face: Int64, identity: Int64) -> Int64:
        """Find the positions (c,) of the pairs of faces (c,) and identities (c,); -1 for those that are none."""
        # The pairs of each face are few, and compared one after the other.
        begin = np.searchsorted(self.face, face)
        count = np.searchsorted(self.face, face, side="right") - begin
        position = np.full(len(face), -1)
        for n in range(int(count.max(initial=0))):
            at = np.flatnonzero(n < count)
            is_found = self.identity[begin[at] + n] == identity[at]
            position[at[is_found]] = begin[at[is_found]] + n
        return position

    def _cut(self, pairs: slice, first: int) -> "LabelCandidates":
        """Cut out some pairs. Positions of faces are counted from the first one."""
        return LabelCandidates(
            self.face[pairs] - first,
            self.identity[pairs],
            self.is_own[pairs],
            self.identity_count,
            None if self.is_near is None else self.is_near[pairs],
            None if self.is_certain is None else self.is_certain[pairs],
        )


@dataclass(frozen=True)
class FaceBlock:
    """Some faces that follow each other, with all their candidates.

    Attributes:
        faces: Positions of the faces.
        pairs: Positions of their candidates.
        candidates: The same candidates, whose faces are counted from the first one of the block.
    """

    faces: slice
    pairs: slice
    candidates: LabelCandidates


def find_candidates(labels: Int64, pairs: Iterable[Pairs]) -> LabelCandidates:
    """Find the identities that each labelled face may belong to: its own label, and those of its neighbours.

    Args:
        labels: number of each face's identity, (n,), -1 for none.
        pairs: neighbouring faces, in parts. A pair may come more than once.

    Returns:
        Each face and identity once.
    """
    identity_count = int(labels.max(initial=-1)) + 1
    # Every face with the labels of its neighbours, by range of faces. Faces without a label have no candidates.
    ranges = PartitionedTable(_NEIGHBOURS, count_partitions(_NEIGHBOURS_PER_FACE * len(labels)))
    faces_per_range = max(1, -(-len(labels) // ranges.count))
    stride = max(1, identity_count)
    for part in pairs:
        keys = np.unique(_list_neighbour_keys(labels, part, stride))
        face = keys // stride
        ranges.append(pa.table([keys], schema=_NEIGHBOURS), face // faces_per_range)
    # With the own label, each once.
    most = int(ranges.rows.sum()) + len(labels)
    columns = [TemporaryColumn(dtype, most) for dtype in (np.int64, np.int64, np.bool_, np.bool_)]
    for number, table in enumerate(ranges):
        near = np.unique(table["key"].to_numpy())
        first = number * faces_per_range
        labelled = first + np.flatnonzero(labels[first : first + faces_per_range] >= 0)
        own = labelled * stride + labels[labelled]
        keys = np.union1d(near, own)
        face = keys // stride
        identity = keys % stride
        parts = (face, identity, identity == labels[face], is_in_sorted(near, keys))
        for column, values in zip(columns, parts, strict=True):
            column.append(values)
    face, identity, is_own, is_near = (column.array for column in columns)
    return LabelCandidates(face, identity, is_own, identity_count, is_near)


def _list_neighbour_keys(labels: Int64, pairs: Pairs, stride: int) -> Int64:
    """List face * stride + label of a neighbour, for labelled faces; some come more than once."""
    faces = np.concatenate([pairs.u, pairs.v])
    identities = np.concatenate([labels[pairs.v], labels[pairs.u]])
    return np.asarray((faces * stride + identities)[(identities >= 0) & (labels[faces] >= 0)], np.int64)


@dataclass(frozen=True)
class FaceVectors:
    """Vectors of faces and how crowded the space around them is.

    Attributes:
        vectors: Unit vectors, (n, dim).
        density: Local density of each face, (n,).
        photo: Number of the image of each face, (n,). Faces of one image do not vouch for each other's label. Without
            it each face has an image of its own.
    """

    vectors: Float32
    density: Float32
    photo: Int64 | None = None

    @cached_property
    def shares_photo(self) -> Bool:
        """Whether another face is in the image of each face, (n,)."""
        if self.photo is None:
            return np.zeros(len(self.density), bool)
        return np.asarray(np.bincount(self.photo, minlength=len(self.photo))[self.photo] > 1)


@dataclass(frozen=True)
class IdentityCentres:
    """Weighted sums of the faces of k identities.

    Attributes:
        sums: Sums of the vectors, (k, dim), each weighted by the share to which the face belongs.
        crowd: Sums of the densities, (k,), weighted in the same way.
        weight: Sums of the shares, (k,).
    """

    sums: Float32
    crowd: Float32
    weight: Float32

    @classmethod
    def from_shares(cls, faces: FaceVectors, candidates: LabelCandidates, share: Float32) -> "IdentityCentres":
        """Sum the faces of each identity.

        Args:
            faces: n faces.
            candidates: m pairs of a face and an identity.
            share: share to which the face belongs to the identity, (m,).
        """
        vectors = np.asarray(faces.vectors)
        sums = make_temporary_array(np.float32, (candidates.identity_count, vectors.shape[1]))
        crowd = np.zeros(candidates.identity_count, np.float32)
        weight = np.zeros(candidates.identity_count, np.float32)
        for pairs in _cut_groups(candidates.pair_counts, _PAIRS_PER_BLOCK):
            # Some identities with all their pairs: what the sums of one are does not depend on the others.
            order = candidates.by_identity[pairs]
            order = order[share[order] > _MIN_SHARE]
            groups = candidates.identity[order]
            for block, starts in iterate_pieces(groups, _BLOCK):
                face = candidates.face[order[block]]
                part = share[order[block]]
                add_pieces(sums, groups[block], vectors[face] * part[:, None], starts)
                add_pieces(crowd, groups[block], faces.density[face] * part, starts)
                add_pieces(weight, groups[block], part, starts)
        return cls(sums, crowd, weight)

    def compute_fit(self, faces: FaceVectors, face: Int64, identity: Int64, share: Float32) -> tuple[Float32, Float32]:
        """Compute the mean similarity of faces to the rest of identities.

        The rest has neither the face itself nor others of its image.

        Args:
            faces: n faces.
            face: position of the face of each pair, (m,).
            identity: number of the identity of each pair, (m,).
            share: share of the face in the identity's sums, (m,). It is taken out of them.

        Returns:
            The mean similarity (m,), and the weight (m,) of the faces that it rests on.
        """
        similarity = make_temporary_array(np.float32, (len(face),))
        rest = make_temporary_array(np.float32, (len(face),))
        vectors = np.asarray(faces.vectors)
        for at in range(0, len(face), _BLOCK):
            block = slice(at, at + _BLOCK)
            rows = face[block]
            centres = identity[block]
            # Take the face's own share out of the sums, and compare it with the mean of the rest.
            own = _drop_small(share[block])
            product = np.einsum("nd,nd->n", vectors[rows], self.sums[centres]) - own
            weight = np.maximum(self.weight[centres] - own, 0)
            divisor = np.maximum(weight, _MIN_SHARE)
            crowd = (self.crowd[centres] - own * faces.density[rows]) / divisor
            similarity[block] = product / divisor - (faces.density[rows] + crowd) / 2
            rest[block] = weight
        self._leave_photos_out(faces, face, identity, share, similarity, rest)
        return similarity, rest

    def _leave_photos_out(
        self, faces: FaceVectors, face: Int64, identity: Int64, share: Float32, similarity: Float32, rest: Float32
    ) -> None:
        """Compute similarities and weights of faces that share an image anew, without all faces of their image."""
        if faces.photo is None:
            return
        # Sum the faces of each image and identity, to take them out of the identity.
        for shared in _find_shared(faces, faces.photo, face, identity, share):
            keys = faces.photo[face[shared]] * len(self.weight) + identity[shared]
            group_keys, group = np.unique(keys, return_inverse=True)
            pairs = LabelCandidates(face[shared], group, np.ones(len(shared), bool), len(group_keys))
            photos = IdentityCentres.from_shares(faces, pairs, share[shared])
            rows = face[shared]
            centres = identity[shared]
            sums = self.sums[centres] - photos.sums[group]
            weight = np.maximum(self.weight[centres] - photos.weight[group], 0)
            divisor = np.maximum(weight, _MIN_SHARE)
            crowd = (self.crowd[centres] - photos.crowd[group]) / divisor
            product = np.einsum("nd,nd->n", faces.vectors[rows], sums)
            similarity[shared] = product / divisor - (faces.density[rows] + crowd) / 2
            rest[shared] = weight


def _drop_small(share: Float32) -> Float32:
    """Replace shares (m,) that count as none by 0."""
    return np.where(share > _MIN_SHARE, share, np.float32(0))


def _cut_groups(counts: Int64, block_rows: int) -> Iterator[slice]:
    """Cut rows that are sorted by group into blocks of whole groups, by the number of rows (k,) of each."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(ends):
        begin = int(ends[first] - counts[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + block_rows, side="right")))
        yield slice(begin, int(ends[last - 1]))
        first = last


def _find_shared(faces: FaceVectors, photo: Int64, face: Int64, identity: Int64, share: Float32) -> Iterator[Int64]:
    """Find the pairs of faces that share their image and count, some images and identities at a time."""
    found = [np.empty(0, np.int64)]
    for at in range(0, len(face), _PAIRS_PER_BLOCK):
        block = slice(at, at + _PAIRS_PER_BLOCK)
        found.append(at + np.flatnonzero(faces.shares_photo[face[block]] & (share[block] > _MIN_SHARE)))
    shared = np.concatenate(found)
    order = np.lexsort((identity[shared], photo[face[shared]]))
    shared = shared[order]
    is_new = (np.diff(photo[face[shared]], prepend=-1) != 0) | (np.diff(identity[shared], prepend=-1) != 0)
    counts = np.diff(np.flatnonzero(is_new), append=len(shared))
    for block in _cut_groups(counts, _BLOCK):
        yield shared[block]
