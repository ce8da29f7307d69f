"""Gather, through the index, the new images and all images that a full comparison would group with them.

The search goes outward from the new images: faces near theirs, the images of those faces, and so on along copies,
until the neighbours of every gathered image are known. What is gathered grows with the new images and their groups, not
with the gallery.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.hashes import HashLookup, is_telling, make_variants
from facepipe.curation.duplicates.images import COLUMNS, RankedImages, add_size_and_side, rank_images
from facepipe.curation.duplicates.pairs import ImageLinks, MeasureFaces, classify_pairs
from facepipe.curation.duplicates.rule import KINDS, NEAR, DuplicateRule
from facepipe.curation.duplicates.stars import build_stars
from facepipe.curation.graph.nodes import find_representatives
from facepipe.decisions.persons import DecidedFaces
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import TableChanges
from facepipe.index.rows import read_unit_vectors
from facepipe.index.search import Index
from facepipe.nearest.similarity import Pairs
from facepipe.schema import FACES
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Bool, Float32, Int64

# Neighbours per face. If a picture is there more often, the copy that is kept is compared with all.
_MAX_NEIGHBOURS = 256
_QUERIES = 16384
_HASH_ROWS = 262_144
_FILE = "file"
_NO_IDS = np.empty(0, np.int64)
_NO_PAIRS = Pairs(_NO_IDS, _NO_IDS, np.empty(0, np.float32))


@dataclass(frozen=True)
class NewImages:
    """New images with everything that they have to be compared with.

    Attributes:
        table: Rows as `find_duplicates` takes them, and `file`, the gallery's file that an old row is in.
        is_new: Whether each row is of a new image.
        edges: Pairs of rows, u < v, with the distance of their faces.
        measure: Computes the distances of the faces in rows u (m,) and v (m,).
        query_count: Number of faces that were looked up in the index.
    """

    table: pa.Table
    is_new: Bool
    edges: Pairs
    measure: MeasureFaces
    query_count: int


def gather_new_images(
    changes: TableChanges,
    open_index: Callable[[], Index],
    rule: DuplicateRule,
    progress: Callable[[str], None],
    decided: DecidedFaces,
) -> NewImages | None:
    """Gather the new images of a gallery and all images that they have to be compared with.

    Args:
        changes: what came into the gallery.
        open_index: opens the gallery's index. It is called only if there is something to look up.
        rule: what counts as a duplicate.
        progress: called with each line of progress.
        decided: what people have decided: it says which copies are kept.

    Returns:
        None if there are no new images.

    Raises:
        IndexingError: if the index lacks faces of the new images.
    """
    gallery = changes.gallery
    rows, ids = _read_new_rows(changes)
    if not rows.num_rows:
        return None
    index = open_index()
    _require_faces(index, ids, gallery.path)
    uris = pc.unique(rows["uri"])
    # Begin with the new rows, and with old images of the same bytes, which may have no face.
    table = pa.concat_tables([rows, _read_images(gallery, _find_same_bytes(gallery, rows, uris))])
    # And with old images whose hashes nearly agree, and with those that nearly agree with these.
    while True:
        near_uris = _find_near_hashes(gallery, table)
        if not len(near_uris):
            break
        table = pa.concat_tables([table, _read_images(gallery, near_uris)])
    search = _NeighbourSearch(index, rule, decided)
    # Repeat until the neighbours of all affected images are known.
    while len(ids):
        progress(f"{len(ids)} faces: looking for near ones")
        near_uris = search.look_up(ids, table)
        table = pa.concat_tables([table, _read_images(gallery, _drop_known(near_uris, table))])
        ids = search.find_next(table, _is_one_of(table, uris))
    table = table.combine_chunks()
    ids_of_rows = pc.fill_null(table["face_id"], -1).to_numpy()

    def measure(u: Int64, v: Int64) -> Float32:
        left = index.get_vectors(ids_of_rows[u])
        right = index.get_vectors(ids_of_rows[v])
        return np.asarray(np.linalg.norm(left - right, axis=1), np.float32)

    return NewImages(table, _is_one_of(table, uris), search.build_edges(table), measure, search.query_count)


def _read_new_rows(changes: TableChanges) -> tuple[pa.Table, Int64]:
    """Read the rows of new images, and the sorted ids of their faces that can be searched for."""
    parts = [_make_empty_table()]
    ids = [_NO_IDS]
    for batch in changes.read_new_rows([*COLUMNS, "embedding"]):
        faces = batch.filter(batch["face_id"].is_valid())
        # Only faces with a usable vector are in the index.
        ids.append(faces["face_id"].to_numpy()[read_unit_vectors(faces["embedding"], changes.gallery.dim)[1]])
        part = pa.Table.from_batches([batch]).drop_columns("embedding")
        part = part.append_column(_FILE, pa.nulls(part.num_rows, pa.string()))
        parts.append(add_size_and_side(part, 0))
    return pa.concat_tables(parts), np.unique(np.concatenate(ids))


def _make_empty_table() -> pa.Table:
    schema = pa.schema([*(FACES.field(name) for name in COLUMNS), (_FILE, pa.string())])
    return add_size_and_side(schema.empty_table(), 0)


def _require_faces(index: Index, ids: Int64, gallery: str) -> None:
    missing = sum(int((~index.get_vectors(part).any(axis=1)).sum()) for part in _split(ids))
    if missing:
        raise IndexingError(
            f"the index of {gallery!r} lacks {missing} of {len(ids)} new faces: `facepipe index {gallery}` adds them"
        )


def _split(ids: Int64) -> Iterator[Int64]:
    """Split ids into parts that are looked up together."""
    for at in range(0, len(ids), _QUERIES):
        yield ids[at : at + _QUERIES]


def _find_same_bytes(gallery: Gallery, rows: pa.Table, uris: pa.Array) -> pa.Array:
    """Find the old images with the same bytes as new rows, by one pass over two columns.

    The index does not have them all: an image without a face is not in it.
    """
    image_ids = pc.unique(rows["image_id"]).drop_null()
    same = gallery.to_arrow(["uri", "image_id"], ds.field("image_id").isin(image_ids))["uri"]
    return pc.unique(same.filter(pc.invert(pc.is_in(same, uris))))


def _find_near_hashes(gallery: Gallery, table: pa.Table) -> pa.Array:
    """Find the images of the gallery that are not in a table, and whose hashes nearly agree with one of it.

    This is one pass over two columns.
    """
    hashes = pc.unique(table["image_hash"]).drop_null().to_numpy()
    hashes = hashes[is_telling(hashes)]
    lookup = HashLookup(np.unique(np.concatenate([hashes, *make_variants(hashes)])))
    found = [pa.array([], pa.string())]
    for batch in gallery.batches(["uri", "image_hash"], "image_hash is not null", rows=_HASH_ROWS):
        unique, inverse = np.unique(batch["image_hash"].to_numpy(), return_inverse=True)
        is_near = np.zeros(len(unique), bool)
        is_near[lookup.find(unique).query] = True
        found.append(batch["uri"].filter(pa.array(is_near[inverse])).cast(pa.string()))
    return _drop_known(pc.unique(pa.concat_arrays(found)), table)


def _read_images(gallery: Gallery, uris: pa.Array) -> pa.Table:
    """Read all rows of some images, with the file that they are in."""
    if not len(uris):
        return _make_empty_table()
    parts = [add_size_and_side(rows, 0) for rows in gallery.read_chosen_rows("uri", uris, COLUMNS, file_column=_FILE)]
    return pa.concat_tables([_make_empty_table(), *parts])


def _drop_known(uris: pa.Array, table: pa.Table) -> pa.Array:
    return uris.filter(pc.invert(pc.is_in(uris, pc.unique(table["uri"]))))


def _is_one_of(table: pa.Table, uris: pa.Array) -> Bool:
    return np.asarray(pc.is_in(table["uri"], uris).to_numpy())


class _NeighbourSearch:
    """Neighbours by face id, as the search goes on."""

    def __init__(self, index: Index, rule: DuplicateRule, decided: DecidedFaces):
        self._index = index
        self._rule = rule
        self._decided = decided
        self._queried = _NO_IDS
        self._full = _NO_IDS  # faces that have more neighbours than one query returns
        self._pairs = [_NO_PAIRS]  # u and v are face ids here

    @property
    def query_count(self) -> int:
        return len(self._queried)

    def look_up(self, ids: Int64, table: pa.Table) -> pa.Array:
        """Look up faces (n,), and return the uris of near faces that are not in the table."""
        known = np.sort(table["face_id"].drop_null().to_numpy())
        unknown = [_NO_IDS]
        for part in _split(ids):
            answers = self._index.search_within(self._index.get_vectors(part), self._rule.radius, _MAX_NEIGHBOURS)
            counts = np.array([len(near) for near, _ in answers])
            near = np.concatenate([near for near, _ in answers])
            distance = np.concatenate([distance for _, distance in answers])
            pairs = Pairs(np.repeat(part, counts), near, distance)
            self._pairs.append(pairs.take(pairs.u != pairs.v))
            # A full answer may lack further neighbours.
            self._full = np.union1d(self._full, part[counts >= _MAX_NEIGHBOURS])
            unknown.append(np.setdiff1d(near, known))
        self._queried = np.union1d(self._queried, ids)
        return pc.unique(self._index.get_labels(np.unique(np.concatenate(unknown)))["uri"]).drop_null()

    def find_next(self, table: pa.Table, is_new: Bool) -> Int64:
        """Find the faces to look up next: those of images that could be in a group with a new one, or in a pair."""
        # Classify what is known so far, to see which images new ones affect.
        images = rank_images(table, self._rule.keep, [self._decided])
        links = classify_pairs(images, table, self.build_edges(table), self._rule)
        is_affected = _find_affected_images(images, links, is_new, self._rule)[images.of_face]
        ids = table["face_id"].filter(pa.array(is_affected)).drop_null().to_numpy()
        candidates = np.setdiff1d(ids, self._queried)
        # Faces without a vector in the index cannot be looked up.
        is_indexed = self._get_vectors(candidates).any(axis=1)
        return candidates[is_indexed]

    def _get_vectors(self, ids: Int64) -> Float32:
        parts = [self._index.get_vectors(part) for part in _split(ids)]
        return np.concatenate([np.empty((0, self._index.dim), np.float32), *parts])

    def build_edges(self, table: pa.Table) -> Pairs:
        """Build the pairs as rows of the table, each once. Faces that are no longer in it are left out."""
        # Rows with a face, by rising id.
        rows = np.flatnonzero(table["face_id"].is_valid())
        ids = table["face_id"].drop_null().to_numpy()
        order = np.argsort(ids)
        ids = ids[order]
        rows = rows[order]
        vectors = self._get_vectors(ids)
        pairs = _drop_pairs_of_copies(_to_positions(Pairs.concatenate(self._pairs), ids), vectors)
        # If an answer was cut off, compare the copy that is kept with all of its copies.
        is_full = np.isin(ids, self._full)
        if is_full.any():
            rank = rank_images(table, self._rule.keep, [self._decided]).of_face[rows]
            stars = build_stars(vectors.__getitem__, rank, pairs, is_full, radius=self._rule.radius)
            pairs = _drop_repeated(Pairs.concatenate([pairs, stars]), len(ids))
        ends = np.sort(np.stack([rows[pairs.u], rows[pairs.v]]), axis=0)
        return Pairs(ends[0], ends[1], pairs.distance)


def _to_positions(pairs: Pairs, ids: Int64) -> Pairs:
    """Turn pairs of ids into pairs of positions in the sorted ids, each once."""
    u = find_sorted(ids, pairs.u)
    v = find_sorted(ids, pairs.v)
    is_known = (u >= 0) & (v >= 0)
    low = np.minimum(u, v)[is_known]
    high = np.maximum(u, v)[is_known]
    return _drop_repeated(Pairs(low, high, pairs.distance[is_known]), len(ids))


def _drop_pairs_of_copies(pairs: Pairs, vectors: Float32) -> Pairs:
    """Drop the pairs of copies that a graph does not have either.

    Of faces with identical vectors the first is compared with others, and the rest only with the first.
    """
    first = find_representatives(vectors)
    is_first = first == np.arange(len(first))
    is_between_firsts = is_first[pairs.u] & is_first[pairs.v]
    is_to_own_first = (first[pairs.u] == pairs.v) | (first[pairs.v] == pairs.u)
    return pairs.take(is_between_firsts | is_to_own_first)


def _drop_repeated(pairs: Pairs, count: int) -> Pairs:
    return pairs.take(np.unique(pairs.u * count + pairs.v, return_index=True)[1])


def _find_affected_images(images: RankedImages, links: ImageLinks, is_new: Bool, rule: DuplicateRule) -> Bool:
    """Find the images (n,) that new images affect.

    These are the images in a group with a new one, the images that are linked to one of those, and the copies of the
    latter. The copies matter because the number of pairs that two groups of copies make depends on all of them.
    """
    # Components of images that equal bytes, or links of a kind that makes groups, connect.
    count = len(images)
    groups_images = links.kind <= max(KINDS.index(NEAR), KINDS.index(rule.drop))
    rows = np.concatenate([links.a[groups_images], np.arange(count)])
    columns = np.concatenate([links.b[groups_images], images.first_with_bytes])
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), (count, count))
    group = connected_components(graph, directed=False)[1]
    is_touched = np.isin(group, group[images.of_face[is_new]])
    # Images that are linked to a touched group, with all that is connected to them.
    is_linked = is_touched[links.a] | is_touched[links.b]
    is_beside = np.isin(group, group[np.concatenate([links.a[is_linked], links.b[is_linked]])])
    return np.asarray(is_touched | is_beside)
