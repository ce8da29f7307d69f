"""What the centroids of an index's lists rest on: each is a mean over many faces, and none is the likeness of a few.

A centroid that k-means made of one face is a copy of that face, in the template and in every shard. So lists of few
faces are given up when a template is trained, and the centroids of lists are looked at when faces are erased. A list
that is given up has a centroid far from all faces: it stays empty, and no search visits it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse

from facepipe.index.grid import round_to_grid
from facepipe.index.shard import Shard, read_list
from facepipe.nearest.faiss_engine import faiss
from facepipe.sorted_lookup import is_in_sorted
from facepipe.types import Bool, Float32, Float64, Int64

MIN_FACES = 20
"""Faces of the training sample that a centroid rests on, at least."""
MIN_LEFT = 10
"""Faces that a list has, at least: below, an erasure gives it up."""

_GIVEN_UP_NORM = 4.0
_BATCH_ROWS = 65536
# An erased face that is so near to a centroid is as good as the centroid itself. The mean of twenty photos of a person
# is several times as far from each.
_SAME = 0.05
# Of lists with fewer erased faces than this share, and none so near, the centroid is not looked at further.
_SMALL_SHARE = 0.2
_NEAR = 0.15
# Share of a centroid that erased faces may make up.
_MAX_SHARE = 0.5
# Faces of a list that are read, to know its mean.
_MAX_MEMBERS = 4096


def read_centroids(index: Any) -> Float32:
    """Read the centroids of an index with lists, also of those that were given up, (lists, d)."""
    ivf = faiss.extract_index_ivf(index)
    return np.asarray(ivf.quantizer.reconstruct_n(0, ivf.nlist), np.float32)


def find_given_up(centroids: Float32) -> Bool:
    """Tell for each centroid (lists, d) whether its list was given up."""
    return np.asarray(np.linalg.norm(centroids, axis=1) > _GIVEN_UP_NORM / 2)


def replace_centroids(index: Any, centroids: Float32) -> None:
    """Give an empty index other centroids."""
    ivf = faiss.extract_index_ivf(index)
    ivf.quantizer.reset()
    ivf.quantizer.add(round_to_grid(centroids))


def _place_far(lists: Int64, dimension: int) -> Float32:
    """Place centroids far from all unit vectors and from each other, which a graph over centroids needs."""
    centroids = [np.random.default_rng(int(number)).standard_normal(dimension) for number in lists]
    array = np.array(centroids, np.float64).reshape(len(lists), dimension)
    return np.asarray(_GIVEN_UP_NORM * array / np.linalg.norm(array, axis=1, keepdims=True), np.float32)


def transform(index: Any, vectors: Float32) -> Float32:
    """Return vectors (n, dim) as the lists of an index have them, (n, d)."""
    chained = faiss.downcast_index(index)
    result = round_to_grid(vectors)
    if isinstance(chained, faiss.IndexPreTransform) and len(vectors):
        for number in range(chained.chain.size()):
            result = faiss.downcast_VectorTransform(chained.chain.at(number)).apply(result)
    return np.asarray(result, np.float32)


def assign_lists(index: Any, vectors: Float32, quantizer: Any = None) -> tuple[Int64, Float32]:
    """Assign vectors to the lists of an index.

    Args:
        index: the index.
        vectors: (n, dim).
        quantizer: index of the centroids; the index's own by default.

    Returns:
        The list of each vector, and the distance to its centroid, (n,).
    """
    quantizer = quantizer or faiss.extract_index_ivf(index).quantizer
    lists = np.empty(len(vectors), np.int64)
    distances = np.empty(len(vectors), np.float32)
    for at in range(0, len(vectors), _BATCH_ROWS):
        squared, nearest = quantizer.search(transform(index, vectors[at : at + _BATCH_ROWS]), 1)
        lists[at : at + _BATCH_ROWS] = nearest[:, 0]
        distances[at : at + _BATCH_ROWS] = np.sqrt(np.maximum(squared[:, 0], 0))
    return lists, distances


def settle_centroids(index: Any, sample: Float32, clustering_index: Any = None) -> None:
    """Make every centroid the mean of at least MIN_FACES faces of the training sample.

    Lists of fewer faces are given up, smallest first, and their faces go to the nearest of the others. At least one
    list stays.

    Args:
        index: a trained, empty index with lists.
        sample: what it was trained on, unit vectors (n, dim).
        clustering_index: an empty index, on GPUs for example, that may be used to find the nearest centroids.
    """
    ivf = faiss.extract_index_ivf(index)
    centroids = round_to_grid(ivf.quantizer.reconstruct_n(0, ivf.nlist))
    quantizer = ivf.quantizer
    if clustering_index is not None:
        quantizer = clustering_index
        quantizer.reset()
        quantizer.add(centroids)
    lists, _ = assign_lists(index, sample, quantizer)
    if clustering_index is not None:
        clustering_index.reset()
    sums = _sum_by_list(index, sample, lists, ivf.nlist)
    counts = np.bincount(lists, minlength=ivf.nlist)
    is_kept = np.ones(ivf.nlist, bool)
    while True:
        small = np.flatnonzero(is_kept & (counts < MIN_FACES))
        # Half of the small lists at a time: the faces of these make others large enough.
        leaving = small[np.argsort(counts[small], kind="stable")][: min(-(-len(small) // 2), int(is_kept.sum()) - 1)]
        if not len(leaving):
            break
        is_kept[leaving] = False
        moving = np.flatnonzero(np.isin(lists, leaving))
        others = faiss.IndexFlatL2(centroids.shape[1])
        others.add(centroids[is_kept])
        nearest, _ = assign_lists(index, sample[moving], others)
        lists[moving] = np.flatnonzero(is_kept)[nearest]
        sums += _sum_by_list(index, sample[moving], lists[moving], ivf.nlist)
        counts = np.bincount(lists, minlength=ivf.nlist)
        sums[leaving] = 0
    means = np.asarray(sums / np.maximum(counts, 1)[:, None], np.float32)
    given_up = np.flatnonzero(~is_kept)
    means[given_up] = _place_far(given_up, means.shape[1])
    replace_centroids(index, means)


def _sum_by_list(index: Any, vectors: Float32, lists: Int64, count: int) -> Float64:
    """Sum vectors (n, dim) by their lists, (count, d)."""
    total = np.zeros((count, faiss.extract_index_ivf(index).d))
    for at in range(0, len(vectors), _BATCH_ROWS):
        part = lists[at : at + _BATCH_ROWS]
        shape = (count, len(part))
        member = scipy.sparse.csr_matrix((np.ones(len(part)), (part, np.arange(len(part)))), shape=shape)
        total += member @ transform(index, vectors[at : at + _BATCH_ROWS]).astype(np.float64)
    return total


@dataclass(frozen=True)
class ListMembers:
    """The faces in the lists of several shards that stay.

    Attributes:
        counts: faces per list, (lists,).
        ids: ids of the faces of some lists, by list and by shard.
    """

    counts: Int64
    ids: dict[int, list[Int64]]


def read_members(shards: Sequence[Shard], lists: Int64, gone: Int64) -> ListMembers:
    """Read how many faces each list has, and which ones some lists have.

    Args:
        shards: the shards.
        lists: numbers of the lists whose ids are wanted.
        gone: sorted ids of faces that leave the index; tombstoned ones are left out anyway.
    """
    counts = np.zeros(0, np.int64)
    ids: dict[int, list[Int64]] = {int(number): [] for number in lists}
    for shard in shards:
        index = shard.open_index()
        ivf = faiss.extract_index_ivf(index)
        inverted = ivf.invlists
        sizes = np.array([inverted.list_size(number) for number in range(ivf.nlist)], np.int64)
        counts = sizes if not len(counts) else counts + sizes
        # Faces that are deleted are still in the lists.
        leaving = np.union1d(shard.tombstones, gone[shard.find_rows(gone)[0]] if len(gone) else gone)
        if len(leaving):
            held, rows = shard.find_rows(leaving)
            vectors = _read_rows(shard, rows[held])
            counts -= np.bincount(assign_lists(index, vectors)[0], minlength=ivf.nlist)
        for number, parts in ids.items():
            members = read_list(inverted, number)
            parts.append(members[~is_in_sorted(leaving, members)])
    return ListMembers(counts, ids)


def _read_rows(shard: Shard, rows: Int64) -> Float32:
    """Read the vectors of rows of a shard, (n, dim)."""
    return np.ascontiguousarray(shard.vectors[np.sort(rows)], np.float32)


def read_vectors(shard: Shard, ids: Int64) -> Float32:
    """Read the vectors of faces that a shard holds, (n, dim)."""
    return np.ascontiguousarray(shard.vectors[shard.find_rows(ids)[1]], np.float32)


@dataclass(frozen=True)
class _ErasedFaces:
    """What erased faces are to the lists of an index.

    Attributes:
        counts: erased faces per list, (lists,).
        sums: sums of their vectors, (lists, d).
        nearest: distance of the nearest of them to the centroid, (lists,).
    """

    counts: Int64
    sums: Float64
    nearest: Float64


def _measure_erased(template: Any, shards: Sequence[Shard], gone: Int64) -> _ErasedFaces:
    ivf = faiss.extract_index_ivf(template)
    counts = np.zeros(ivf.nlist, np.int64)
    sums = np.zeros((ivf.nlist, ivf.d))
    nearest = np.full(ivf.nlist, np.inf)
    for shard in shards:
        own = gone[shard.find_rows(gone)[0]] if len(gone) else gone
        for at in range(0, len(own), _BATCH_ROWS):
            vectors = read_vectors(shard, own[at : at + _BATCH_ROWS])
            lists, distances = assign_lists(template, vectors)
            counts += np.bincount(lists, minlength=ivf.nlist)
            sums += _sum_by_list(template, vectors, lists, ivf.nlist)
            np.minimum.at(nearest, lists, distances)
    return _ErasedFaces(counts, sums, nearest)


def choose_centroids(template: Any, shards: Sequence[Shard], gone: Int64) -> Float32 | None:
    """Choose the centroids that an index may have when faces are erased from it.

    A list is given up if hardly any face stays in it. A centroid that rests mostly on erased faces becomes the mean of
    those that stay.

    Args:
        template: the trained, empty index.
        shards: all shards.
        gone: sorted ids of the erased faces.

    Returns:
        The centroids, (lists, d); None if all may stay as they are.
    """
    centroids = read_centroids(template)
    if not shards:
        return None
    is_given_up = find_given_up(centroids)
    erased = _measure_erased(template, shards, gone)
    counts = read_members(shards, np.empty(0, np.int64), gone).counts
    # Lists with so few faces that their centroids are not much more than a face.
    leaving = ~is_given_up & (counts < MIN_LEFT)
    is_suspect = (erased.counts > _SMALL_SHARE * (erased.counts + counts)) | (erased.nearest < _NEAR)
    suspects = np.flatnonzero(is_suspect & (erased.counts > 0) & ~leaving & ~is_given_up)
    members = read_members(shards, suspects, gone) if len(suspects) else ListMembers(counts, {})
    changed: dict[int, Float32] = {}
    for number in suspects.tolist():
        mean = _compute_mean(template, shards, members.ids[number])
        own = erased.sums[number] / erased.counts[number]
        if erased.nearest[number] < _SAME or _compute_share(centroids[number], own, mean) > _MAX_SHARE:
            changed[number] = mean
    if not leaving.any() and not changed:
        return None
    chosen = centroids.copy()
    for number, mean in changed.items():
        chosen[number] = mean
    if (leaving | is_given_up).all():
        # Hardly any face is left at all: one list holds them.
        largest = int(np.argmax(np.where(leaving, counts, -1)))
        leaving[largest] = False
        ids = read_members(shards, np.array([largest]), gone).ids[largest]
        chosen[largest] = _compute_mean(template, shards, ids) if counts[largest] else 0
    given_up = np.flatnonzero(leaving)
    chosen[given_up] = _place_far(given_up, chosen.shape[1])
    return chosen


def _compute_mean(template: Any, shards: Sequence[Shard], ids: Sequence[Int64]) -> Float32:
    """Compute the mean of faces, (d,), of up to some thousands of them.

    Args:
        template: the trained, empty index.
        shards: the shards.
        ids: the ids of the faces in each.
    """
    total = sum(map(len, ids))
    step = max(1, -(-total // _MAX_MEMBERS))
    parts = [read_vectors(shard, np.sort(own)[::step]) for shard, own in zip(shards, ids, strict=True) if len(own)]
    return np.asarray(transform(template, np.concatenate(parts)).mean(axis=0), np.float32)


def _compute_share(centroid: Float32, erased: Float64, staying: Float32) -> float:
    """Compute how much of a centroid erased faces make up: where it lies between their mean and that of the others."""
    line = erased - staying
    length = float(line @ line)
    return float((centroid - staying) @ line) / length if length else 0.0


def count_thin_lists(template: Any, shards: Sequence[Shard]) -> int:
    """Count the lists of an index with so few faces that their centroids may be the likeness of one that is gone."""
    centroids = read_centroids(template)
    if not shards:
        return 0
    none = np.empty(0, np.int64)
    return int((~find_given_up(centroids) & (read_members(shards, none, none).counts < MIN_LEFT)).sum())
