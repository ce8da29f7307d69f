"""New images with all that a comparison of everything would put into groups with them, gathered through the index.

From the new images outward: faces near theirs, the images of those, and so on along copies until no image is left whose
neighbours are not known. What is gathered grows with the new images and their groups, not with the gallery.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from facepipe.curation.duplicates.gather import COLUMNS, SIZE
from facepipe.curation.duplicates.images import Images, images_of
from facepipe.curation.duplicates.pairs import Links, classified
from facepipe.curation.duplicates.rule import KINDS, NEAR, DuplicateRule
from facepipe.curation.duplicates.stars import stars
from facepipe.curation.graph.edges import joined
from facepipe.curation.graph.nodes import representatives
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.fresh import Changes
from facepipe.index.rows import unit_vectors
from facepipe.index.search import Index
from facepipe.nearest.similarity import Pairs
from facepipe.schema import EMBEDDING_DIM, FACES
from facepipe.sorted_lookup import find_sorted
from facepipe.types import Bool, Float32, Int64

_MOST = 256  # neighbours of a face: of a picture that is there more often, the copy that stays is compared with all
_QUERIES = 16384
_FILE = "file"
_NO_VECTORS = np.empty((0, EMBEDDING_DIM), np.float32)
_NO_PAIRS = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True)
class Around:
    """table: rows of images as `find_duplicates` takes them, and `file`, the table's file a row is in; new (rows,):
    which are of new images; edges: pairs of rows, u < v, with the distance of their faces; asked: faces looked up."""

    table: pa.Table
    new: Bool
    edges: Pairs
    asked: int


def around(
    changes: Changes, index: Callable[[], Index], rule: DuplicateRule, progress: Callable[[str], None]
) -> Around | None:
    """All about the images that came since; None where there are none.

    Raises IndexingError where the index, which is opened when there is something to look up, lacks faces of them.
    """
    gallery = changes.gallery
    rows, ids = _new(changes)
    if not rows.num_rows:
        return None
    opened = index()
    _require(opened, ids, gallery.path)
    uris = pc.unique(rows["uri"])
    table = pa.concat_tables([rows, _rows(gallery, _same_bytes(gallery, rows, uris))])
    found = _Found(opened, rule)
    while len(ids):
        progress(f"{len(ids)} faces: looking for near ones")
        missing = found.ask(ids, table)
        table = pa.concat_tables([table, _rows(gallery, _unknown(missing, table))])
        new = _is_new(table, uris)
        ids = found.next(table, new)
    return Around(table.combine_chunks(), _is_new(table, uris), found.edges(table), found.count)


def _new(changes: Changes) -> tuple[pa.Table, Int64]:
    """(rows of new images, sorted ids of their faces that can be searched for)."""
    parts, ids = [], [np.empty(0, np.int64)]
    wanted = [*COLUMNS, "embedding"]
    for batch in changes.fresh(wanted):
        faces = batch.filter(batch["face_id"].is_valid())
        ids.append(faces["face_id"].to_numpy()[unit_vectors(faces["embedding"])[1]])
        parts.append(pa.Table.from_batches([batch]).drop_columns("embedding"))
    table = pa.concat_tables([_empty(), *(_sized(part.append_column(_FILE, _no_file(part))) for part in parts)])
    return table, np.unique(np.concatenate(ids))


def _no_file(table: pa.Table) -> pa.Array:
    return pa.nulls(table.num_rows, pa.string())


def _empty() -> pa.Table:
    schema = pa.schema([*(FACES.field(name) for name in COLUMNS), (_FILE, pa.string())])
    return _sized(schema.empty_table())


def _sized(table: pa.Table) -> pa.Table:
    """Rows of a gallery as `find_duplicates` wants them."""
    size = pc.struct_field(pc.extract_regex(table["fingerprint"], SIZE), "size").cast(pa.int64())
    table = table.drop_columns("fingerprint").append_column("file_size", size)
    return table.append_column("side", pa.array(np.zeros(table.num_rows, np.int8)))


def _require(index: Index, ids: Int64, gallery: str) -> None:
    lacking = sum(int((~index.vectors(part).any(axis=1)).sum()) for part in _parts(ids))
    if lacking:
        raise IndexingError(
            f"the index of {gallery!r} lacks {lacking} of {len(ids)} new faces: `facepipe index {gallery}` adds them"
        )


def _parts(ids: Int64) -> Iterator[Int64]:
    for at in range(0, len(ids), _QUERIES):
        yield ids[at : at + _QUERIES]


def _same_bytes(gallery: Gallery, rows: pa.Table, uris: pa.Array) -> pa.Array:
    """Where the gallery has the same bytes as in these rows, by one pass over two columns: an image without a face is
    not in the index."""
    images = pc.unique(rows["image_id"]).drop_null()
    held = gallery.to_arrow(["uri", "image_id"], ds.field("image_id").isin(images))["uri"]
    return pc.unique(held.filter(pc.invert(pc.is_in(held, uris))))


def _rows(gallery: Gallery, uris: pa.Array) -> pa.Table:
    """All rows of some images, with the file they are in."""
    if not len(uris):
        return _empty()
    columns = [*COLUMNS, "__filename"]
    scanner = gallery.dataset().scanner(columns=columns, filter=ds.field("uri").isin(uris), batch_readahead=2)
    return pa.concat_tables([_empty(), _sized(scanner.to_table().rename_columns([*COLUMNS, _FILE]))])


def _unknown(uris: pa.Array, table: pa.Table) -> pa.Array:
    return uris.filter(pc.invert(pc.is_in(uris, pc.unique(table["uri"]))))


def _is_new(table: pa.Table, uris: pa.Array) -> Bool:
    return np.asarray(pc.is_in(table["uri"], uris).to_numpy())


class _Found:
    """Neighbours by face id, as they are found."""

    def __init__(self, index: Index, rule: DuplicateRule):
        self._index, self._rule = index, rule
        self._asked, self._full = np.empty(0, np.int64), np.empty(0, np.int64)
        self._pairs = [_NO_PAIRS]  # u and v are face ids here

    @property
    def count(self) -> int:
        return len(self._asked)

    def ask(self, ids: Int64, table: pa.Table) -> pa.Array:
        """Look up faces (n,); the images of those that are near and not in the table."""
        known, strangers = np.sort(table["face_id"].drop_null().to_numpy()), [np.empty(0, np.int64)]
        for part in _parts(ids):
            answers = self._index.within(self._index.vectors(part), self._rule.radius, _MOST)
            counts = np.array([len(found) for found, _ in answers])
            near = np.concatenate([found for found, _ in answers])
            pairs = Pairs(np.repeat(part, counts), near, np.concatenate([distance for _, distance in answers]))
            self._pairs.append(pairs.take(pairs.u != pairs.v))
            self._full = np.union1d(self._full, part[counts >= _MOST])
            strangers.append(np.setdiff1d(near, known))
        self._asked = np.union1d(self._asked, ids)
        return pc.unique(self._index.labels(np.unique(np.concatenate(strangers)))["uri"]).drop_null()

    def next(self, table: pa.Table, new: Bool) -> Int64:
        """Faces that are to be looked up: those of images which could be in a group with a new one, or in a pair."""
        images = images_of(table, self._rule.keep)
        edges = self.edges(table)
        links = classified(images, table, (edges.u, edges.v, edges.distance), self._rule)
        wanted = _concerned(images, links, new, self._rule)[images.of_face]
        ids = table["face_id"].filter(pa.array(wanted)).drop_null().to_numpy()
        left = np.setdiff1d(ids, self._asked)
        return left[np.concatenate([np.empty(0, bool), *(self._index.vectors(p).any(axis=1) for p in _parts(left))])]

    def edges(self, table: pa.Table) -> Pairs:
        """The pairs as rows of the table, each once; those of faces that are in it no more are left out."""
        rows = np.flatnonzero(table["face_id"].is_valid())
        ids = table["face_id"].drop_null().to_numpy()
        order = np.argsort(ids)
        ids, rows = ids[order], rows[order]
        vectors = np.concatenate([_NO_VECTORS, *(self._index.vectors(part) for part in _parts(ids))])
        pairs = _of_one_each(_positions(joined(self._pairs), ids), vectors)
        full = np.isin(ids, self._full)
        if full.any():
            ranks = images_of(table, self._rule.keep).of_face[rows]
            pairs = _once(joined([pairs, stars(vectors, ranks, pairs, full, self._rule.radius)]), len(ids))
        ends = np.sort(np.stack([rows[pairs.u], rows[pairs.v]]), axis=0)
        return Pairs(ends[0], ends[1], pairs.distance)


def _positions(pairs: Pairs, ids: Int64) -> Pairs:
    """Pairs of ids as pairs of positions in the sorted ids."""
    u = find_sorted(ids, pairs.u)
    v = find_sorted(ids, pairs.v)
    here = (u >= 0) & (v >= 0)
    low, high = np.minimum(u, v)[here], np.maximum(u, v)[here]
    return _once(Pairs(low, high, pairs.distance[here]), len(ids))


def _of_one_each(pairs: Pairs, vectors: Float32) -> Pairs:
    """Of faces with identical vectors the first is compared with others, and the rest with it, as in the graph."""
    first = representatives(vectors)
    alone = first == np.arange(len(first))
    return pairs.take((alone[pairs.u] & alone[pairs.v]) | (first[pairs.u] == pairs.v) | (first[pairs.v] == pairs.u))


def _once(pairs: Pairs, count: int) -> Pairs:
    return pairs.take(np.unique(pairs.u * count + pairs.v, return_index=True)[1])


def _concerned(images: Images, links: Links, new: Bool, rule: DuplicateRule) -> Bool:
    """(images,) those in a group with a new one, those linked to one of these, and the copies of the latter: how many
    pairs two groups of copies make depends on all of them."""
    n, own = len(images), np.arange(len(images))
    grouping = links.kind <= max(KINDS.index(NEAR), KINDS.index(rule.drop))
    ends = np.concatenate([links.a[grouping], own]), np.concatenate([links.b[grouping], images.same_bytes])
    group = connected_components(coo_array((np.ones(len(ends[0]), bool), ends), (n, n)), directed=False)[1]
    touched = np.isin(group, group[images.of_face[new]])
    linked = touched[links.a] | touched[links.b]
    beside = np.isin(group, group[np.concatenate([links.a[linked], links.b[linked]])])
    return np.asarray(touched | beside)
