"""Answer who is in photos: for each face the most likely person of a gallery, and who else it could be."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.index.decide import UNKNOWN, DecisionRule, decide_identities
from facepipe.index.search import Index
from facepipe.types import Bool, Float32, Int64

# Neighbours per face: at first, and at most if all of them are of one person.
_FIRST_K = 20
_MAX_K = 1000

QUERY_COLUMNS = ("uri", "status", "error", "face_index", "face_id", "box", "det_score", "embedding")
"""Columns of the photos' own gallery that are read."""

IDENTIFIED = pa.schema(
    [
        ("photo", pa.string()),
        ("status", pa.string()),
        ("error", pa.string()),
        ("face", pa.int16()),
        ("left", pa.float32()),
        ("top", pa.float32()),
        ("right", pa.float32()),
        ("bottom", pa.float32()),
        ("det_score", pa.float32()),
        ("person", pa.string()),
        ("candidate", pa.string()),
        ("distance", pa.float32()),
        ("runner_up", pa.string()),
        ("runner_up_distance", pa.float32()),
        ("margin", pa.float32()),
        ("matched_photo", pa.string()),
        ("matched_face_id", pa.int64()),
        ("query_face_id", pa.int64()),
    ]
)
"""Columns of the answers.

`person` is the decision: a name, or Unknown; null in the row of a photo without a face. `candidate` is the person whose
face is nearest, within the threshold or not, and `distance` is that face's. `runner_up` is the nearest other person,
and `margin` how much farther that one is. If no face near by has a name, both are null, and `matched_photo` is the
nearest photo.
"""


ANSWERED_PHOTOS = IDENTIFIED.append(pa.field("faces", pa.int32()))
"""Columns of the answers with one row per photo: `faces` is the number of its faces."""


@dataclass(frozen=True)
class Candidates:
    """The nearest persons of n faces. A name is None, and a distance infinite, if there is none.

    Attributes:
        names: Name of the nearest person, (n,).
        distances: Distance of the matched face, (n,).
        ids: Id of the matched face, (n,): the nearest one with a name, else the nearest one; -1 for none.
        uris: uri of its photo, (n,).
        runner_ups: Name of the nearest other person, (n,).
        runner_up_distances: Its distance, (n,).
        decisions: Name or `Unknown`, (n,).
    """

    names: npt.NDArray[np.object_]
    distances: Float32
    ids: Int64
    uris: npt.NDArray[np.object_]
    runner_ups: npt.NDArray[np.object_]
    runner_up_distances: Float32
    decisions: npt.NDArray[np.object_]


def find_candidates(index: Index, vectors: Float32, threshold: float, rule: DecisionRule = "nearest") -> Candidates:
    """Find the nearest persons of faces.

    Args:
        index: index of the gallery.
        vectors: unit vectors (n, dim).
        threshold: largest distance that still counts as a match.
        rule: how a name is decided; see `decide_identities`.
    """
    n = len(vectors)
    found = Candidates(
        names=np.full(n, None, object),
        distances=np.full(n, np.inf, np.float32),
        ids=np.full(n, -1, np.int64),
        uris=np.full(n, None, object),
        runner_ups=np.full(n, None, object),
        runner_up_distances=np.full(n, np.inf, np.float32),
        decisions=np.full(n, UNKNOWN, object),
    )
    # Search with more and more neighbours until a face has met two persons.
    pending = np.arange(n)
    k = min(_FIRST_K, index.live)
    while len(pending) and k:
        is_undecided = _look_at_neighbours(index, vectors, pending, k, threshold, rule, found)
        pending = pending[is_undecided]
        if k >= min(index.live, _MAX_K):
            break
        k = min(4 * k, index.live, _MAX_K)
    return found


def _look_at_neighbours(
    index: Index,
    vectors: Float32,
    rows: Int64,
    k: int,
    threshold: float,
    rule: DecisionRule,
    found: Candidates,
) -> Bool:
    """Fill in the candidates of some faces from their k neighbours.

    Returns:
        Of which of them, (len(rows),), more neighbours could tell a runner-up.
    """
    hits = index.search(vectors[rows], k)
    labels = index.get_labels(hits.ids.ravel())
    names = np.array(labels["identity"].to_pylist(), object).reshape(hits.ids.shape)
    uris = np.array(labels["uri"].to_pylist(), object).reshape(hits.ids.shape)
    # Of an image that is being erased the index gives no uri.
    is_there = ~_find_missing(uris)
    names[~is_there] = None
    if rule == "vote" or k <= _FIRST_K:
        found.decisions[rows] = decide_identities(names, hits.distances, threshold, rule)
    is_undecided = np.zeros(len(rows), bool)
    for n, row in enumerate(rows.tolist()):
        named = np.flatnonzero(~_find_missing(names[n]))
        nearest = named if len(named) else np.flatnonzero(is_there[n])
        if len(nearest):
            found.names[row] = names[n, nearest[0]]
            found.distances[row] = hits.distances[n, nearest[0]]
            found.ids[row] = hits.ids[n, nearest[0]]
            found.uris[row] = uris[n, nearest[0]]
        others = [at for at in named.tolist() if names[n, at] != names[n, named[0]]]
        if others:
            found.runner_ups[row] = names[n, others[0]]
            found.runner_up_distances[row] = hits.distances[n, others[0]]
        is_undecided[n] = bool(len(named)) and not others
    return is_undecided


def _find_missing(values: npt.NDArray[np.object_]) -> Bool:
    """Tell which values are None, in an array of the same shape."""
    return np.asarray(values == None)  # noqa: E711  elementwise


def identify_rows(index: Index, rows: pa.Table, threshold: float, rule: DecisionRule = "nearest") -> pa.Table:
    """Identify the faces of photos.

    Args:
        index: index of the gallery.
        rows: rows of the photos' own gallery with `QUERY_COLUMNS`: one per face, or one of a photo without a face.
        threshold: largest distance that still counts as a match.
        rule: how a name is decided.

    Returns:
        A row of `IDENTIFIED` per row, in their order.
    """
    has_face = pc.is_valid(rows["embedding"]).to_numpy(zero_copy_only=False)
    faces = np.flatnonzero(has_face)
    values = pc.list_flatten(rows["embedding"].combine_chunks().drop_null())
    vectors = np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(-1, index.dim)
    found = find_candidates(index, vectors, threshold, rule)

    def spread(values: npt.NDArray[np.generic], kind: pa.DataType, is_null: Bool) -> pa.Array:
        """Put the values of faces into their rows; the other rows are null."""
        places = np.full(rows.num_rows, -1, np.int64)
        places[faces] = np.arange(len(faces))
        column = pa.array(values, kind, mask=is_null)
        return column.take(pa.array(places, mask=places < 0))

    never = np.zeros(len(faces), bool)
    no_match = found.ids < 0
    no_runner_up = _find_missing(found.runner_ups)
    with np.errstate(invalid="ignore"):
        margins = found.runner_up_distances - found.distances
    boxes = rows["box"].to_pylist()
    corners = [[None if box is None else box[corner] for box in boxes] for corner in range(4)]
    columns = [
        rows["uri"],
        rows["status"],
        rows["error"],
        rows["face_index"].cast(pa.int16()),
        *corners,
        rows["det_score"].cast(pa.float32()),
        spread(found.decisions, pa.string(), never),
        spread(found.names, pa.string(), _find_missing(found.names)),
        spread(found.distances, pa.float32(), no_match),
        spread(found.runner_ups, pa.string(), no_runner_up),
        spread(found.runner_up_distances, pa.float32(), no_runner_up),
        spread(margins, pa.float32(), no_runner_up),
        spread(found.uris, pa.string(), no_match),
        spread(found.ids, pa.int64(), no_match),
        rows["face_id"],
    ]
    arrays = [
        column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
        for column, field in zip(columns, IDENTIFIED, strict=True)
    ]
    return pa.table(arrays, schema=IDENTIFIED)


def choose_best_faces(rows: pa.Table) -> pa.Table:
    """Choose one row per photo, and count its faces in a column `faces`.

    Of several faces the one that was identified with the smallest distance counts, and if none was the largest one.

    Args:
        rows: rows of `IDENTIFIED`, those of a photo one after the other or apart.
    """
    frame = rows.to_pandas(integer_object_nulls=True)
    frame["is_named"] = frame["person"].notna() & (frame["person"] != UNKNOWN)
    frame["area"] = (frame["right"] - frame["left"]) * (frame["bottom"] - frame["top"])
    frame["order"] = np.where(frame["is_named"], frame["distance"], -frame["area"].fillna(0))
    frame["faces"] = frame.groupby("photo")["face"].transform("count")
    best = frame.sort_values(["photo", "is_named", "order", "face"], ascending=[True, False, True, True])
    best = best.drop_duplicates("photo").sort_index()
    chosen = rows.take(pa.array(best.index.to_numpy()))
    return chosen.append_column("faces", pa.array(best["faces"], pa.int32()))
