"""Write the clean lists in the layouts that trainers read, and build the rows of the tables of decisions.

Everything is streamed. Names and paths may hold any character.
"""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.curation.cleaning.decide import (
    DECISIONS,
    KEEP,
    REASONS,
    RELABEL,
    REVIEW,
    UNVERIFIED,
    LabelVerdicts,
)
from facepipe.curation.clusters.constraints import hash_uris
from facepipe.curation.graph import GraphInfo
from facepipe.curation.graph.nodes import Nodes
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.schema import NO_FACE
from facepipe.storage import describe_error
from facepipe.storage.mapped import make_temporary_array
from facepipe.storage.partitions import PartitionedTable, count_partitions, spread_keys
from facepipe.text import protect_cell
from facepipe.types import Bool, Float32, Int64

DECISIONS_FILE = "decisions.parquet"
IMAGES_FILE = "images.parquet"
# Decisions on images that have no label to judge.
NO_FACE_FOUND = "no_face"
FAILED = "failed"
UNLABELLED = "unlabelled"
DECISION_SCHEMA = pa.schema(
    [
        ("face_id", pa.int64()),
        ("uri", pa.string()),
        ("identity", pa.string()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("suggested", pa.string()),
        ("suggested_probability", pa.float32()),  # that the suggestion is right
        ("noise", pa.float32()),  # probability that the label is not this face's
        ("distance", pa.float32()),  # to the rest of its identity, as for faces of average surroundings
        ("rest", pa.float32()),  # faces that the identity rests on
        ("nearest_identity", pa.string()),
        ("nearest_distance", pa.float32()),
        ("margin", pa.float32()),  # nearest_distance - distance
        ("face_px", pa.float32()),
        ("sharpness", pa.float32()),
        ("det_score", pa.float32()),
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("identity", pa.string()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("suggested", pa.string()),
        ("noise", pa.float32()),  # probability that no face of the image is the label's
        ("face_id", pa.int64()),  # the face that bears the label
        ("faces", pa.int32()),
    ]
)
_GALLERY_COLUMNS = ("face_id", "uri", "identity", "face_px", "sharpness", "det_score")
_IMAGE_COLUMNS = ("face_id", "uri", "identity", "status")
_LIST_COLUMNS = ("face_id", "uri", "identity", "decision", "reason", "suggested", "nearest_identity", "noise")
_FACES_OF_IMAGES = pa.schema([("key", pa.uint64()), ("node", pa.int64())])
_ROWS = 65536
_LISTED_ROWS = 8192  # made into Python objects at a time
_LINE_BREAKS = ("\n", "\r")


@dataclass
class ListSummary:
    """Figures of the written lists.

    Attributes:
        kept: Rows of clean.csv.
        relabelled: Rows of relabel.csv.
        to_review: Rows of review.csv.
        unlisted: Rows of clean.csv whose path does not fit on a line of a text list.
        root: Folder that paths in msceleb.txt are relative to.
    """

    kept: int = 0
    relabelled: int = 0
    to_review: int = 0
    unlisted: int = 0
    root: str = ""


def build_decision_rows(
    gallery: Gallery, nodes: Nodes, verdicts: LabelVerdicts, names: pa.Array, info: GraphInfo
) -> Iterator[pa.Table]:
    """Build the rows of decisions.parquet: one row per labelled face, in the gallery's order.

    Args:
        gallery: the gallery.
        nodes: the graph's nodes, n faces.
        verdicts: decisions on the labels of the nodes.
        names: names of the identities.
        info: figures of the graph, for distances.
    """
    for batch in gallery.batches(list(_GALLERY_COLUMNS), rows=_ROWS):
        faces = pa.Table.from_batches([batch.filter(batch["face_id"].is_valid())])
        at = nodes.find(faces["face_id"].to_numpy())
        # Leave out faces without a label or a node.
        is_judged = (at >= 0) & (verdicts.decision[at] >= 0)
        yield _build_rows(faces.filter(pa.array(is_judged)), at[is_judged], verdicts, names, info)


def _build_rows(faces: pa.Table, at: Int64, verdicts: LabelVerdicts, names: pa.Array, info: GraphInfo) -> pa.Table:
    distance = _to_distance(info, verdicts.own_similarity[at])
    nearest_distance = _to_distance(info, verdicts.other_similarity[at])
    other = verdicts.other[at]
    # A relabelled face gets a suggestion; the nearest identity is named for every face.
    is_moved = verdicts.is_decided(RELABEL)[at]
    columns: dict[str, Any] = {name: faces[name] for name in _GALLERY_COLUMNS}
    columns |= {
        "decision": pa.array(DECISIONS, pa.string()).take(pa.array(verdicts.decision[at])),
        "reason": pa.array(REASONS, pa.string()).take(pa.array(verdicts.reason[at])),
        "suggested": names.take(pa.array(other, mask=~is_moved)),
        "suggested_probability": pa.array(verdicts.other_probability[at], mask=~is_moved),
        "noise": verdicts.noise[at],
        "distance": _mask_nan(distance),
        "rest": verdicts.own_weight[at],
        "nearest_identity": names.take(pa.array(other, mask=other < 0)),
        "nearest_distance": _mask_nan(nearest_distance),
        "margin": _mask_nan(nearest_distance - distance),
    }
    return pa.table({name: columns[name] for name in DECISION_SCHEMA.names}).cast(DECISION_SCHEMA)


def build_image_rows(gallery: Gallery, nodes: Nodes, verdicts: LabelVerdicts, names: pa.Array) -> Iterator[pa.Table]:
    """Build the rows of images.parquet: every image of the gallery once.

    The decision on an image is that on the face that bears its label.

    Args:
        gallery: the gallery.
        nodes: the graph's nodes, n faces.
        verdicts: decisions on the labels of the nodes.
        names: names of the identities.
    """
    bearer, face_count = _find_image_bearers(gallery, nodes, verdicts)
    pending: dict[str, str | None] = {}  # images of which no face could be compared, with their labels
    for batch in gallery.batches(list(_IMAGE_COLUMNS), rows=_ROWS):
        rows = pa.Table.from_batches([batch])
        at = np.full(len(rows), -1)
        has_face = rows["face_id"].is_valid().to_numpy()
        at[has_face] = nodes.find(rows["face_id"].drop_null().to_numpy())
        # One row per image with a face: that of the face that bears the label.
        is_bearer = at >= 0
        is_bearer[is_bearer] = bearer[at[is_bearer]]
        yield _build_image_rows(rows.filter(pa.array(is_bearer)), at[is_bearer], verdicts, names, face_count)
        # Images without a face, and those that could not be read.
        yield _build_faceless_rows(rows.filter(pa.array(~has_face)))
        # Faces with unusable vectors are few. Their images have a row already if another face is usable.
        unusable = rows.filter(pa.array(has_face & (at < 0)))
        pending.update(zip(unusable["uri"].to_pylist(), unusable["identity"].to_pylist(), strict=True))
    if pending:
        yield _build_unusable_rows(gallery, nodes, pending)


def _find_image_bearers(gallery: Gallery, nodes: Nodes, verdicts: LabelVerdicts) -> tuple[Bool, Int64]:
    """Find the nodes (n,) that stand for their image, and the number of faces (n,) of each node's image."""
    # Faces of one image are in one partition. Hashes of the uris take less memory than they.
    images = PartitionedTable(_FACES_OF_IMAGES, count_partitions(len(nodes)))
    for batch in gallery.batches(["face_id", "uri"], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        at = nodes.find(faces["face_id"].to_numpy())
        keys = hash_uris(faces["uri"])[at >= 0]
        rows = pa.table([keys, at[at >= 0]], schema=_FACES_OF_IMAGES)
        images.append(rows, spread_keys(keys, images.count))
    bearer = np.zeros(len(nodes), bool)
    face_count = make_temporary_array(np.int64, (len(nodes),))
    for table in images:
        key = table["key"].to_numpy()
        node = table["node"].to_numpy()
        # Labelled faces come before others, bearers of a label before bystanders, and likely ones before unlikely ones.
        own = verdicts.take(node)
        noise = np.nan_to_num(own.noise, nan=1.0)
        order = np.lexsort((node, noise, ~own.is_counted, own.decision < 0, key))
        is_first = np.ones(len(order), bool)
        is_first[1:] = key[order[1:]] != key[order[:-1]]
        group = np.cumsum(is_first) - 1
        bearer[node[order[is_first]]] = True
        face_count[node[order]] = np.bincount(group)[group]
    return bearer, face_count


def _build_image_rows(
    rows: pa.Table, at: Int64, verdicts: LabelVerdicts, names: pa.Array, face_count: Int64
) -> pa.Table:
    decision = verdicts.decision[at]
    is_judged = decision >= 0
    words = pa.array([*DECISIONS, UNLABELLED], pa.string())
    columns: dict[str, Any] = {
        "uri": rows["uri"],
        "identity": pc.if_else(pa.array(is_judged), rows["identity"], None),
        "decision": words.take(pa.array(np.where(is_judged, decision, len(DECISIONS)))),
        "reason": pa.array(REASONS, pa.string()).take(pa.array(verdicts.reason[at])),
        "suggested": names.take(pa.array(verdicts.other[at], mask=~verdicts.is_decided(RELABEL)[at])),
        "noise": _mask_nan(verdicts.image_noise[at]),
        "face_id": rows["face_id"],
        "faces": face_count[at],
    }
    return pa.table({name: columns[name] for name in IMAGE_SCHEMA.names}).cast(IMAGE_SCHEMA)


def _build_faceless_rows(rows: pa.Table) -> pa.Table:
    is_no_face = pc.equal(rows["status"], NO_FACE)
    columns: dict[str, Any] = {
        "uri": rows["uri"],
        "identity": rows["identity"],
        "decision": pc.if_else(is_no_face, NO_FACE_FOUND, FAILED),
        "reason": pc.if_else(is_no_face, "no face was found", rows["status"]),
        "suggested": pa.nulls(len(rows), pa.string()),
        "noise": pa.nulls(len(rows), pa.float32()),
        "face_id": pa.nulls(len(rows), pa.int64()),
        "faces": np.zeros(len(rows), np.int32),
    }
    return pa.table({name: columns[name] for name in IMAGE_SCHEMA.names}).cast(IMAGE_SCHEMA)


def _build_unusable_rows(gallery: Gallery, nodes: Nodes, pending: dict[str, str | None]) -> pa.Table:
    """Build the rows of images all of whose faces have unusable vectors."""
    for batch in gallery.batches(["face_id", "uri"], rows=_ROWS):
        faces = batch.filter(batch["face_id"].is_valid())
        is_node = nodes.find(faces["face_id"].to_numpy()) >= 0
        for uri in faces["uri"].filter(pa.array(is_node)).to_pylist():
            pending.pop(uri, None)
    rows = [
        {"uri": uri, "identity": name or None, "decision": FAILED, "reason": "no usable vector", "faces": 0}
        for uri, name in pending.items()
    ]
    return pa.Table.from_pylist(rows, IMAGE_SCHEMA)


def _to_distance(info: GraphInfo, similarity: Float32) -> Float32:
    # For two faces of mean density: similarity = 1 - distance^2 / 2 - mean density.
    return np.sqrt(np.maximum(0, 2 - 2 * (similarity + np.float32(info.mean_density))))


def _mask_nan(values: Float32) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def write_lists(folder: str, *, relabels: bool, unverified: bool = True) -> ListSummary:
    """Write the lists that follow from decisions.parquet into its folder.

    The lists are clean.csv, clean.txt and msceleb.txt (path and number of the label per line), labels.csv (number and
    name), relabel.csv and review.csv. In the CSV files a cell that a spreadsheet would take for a formula has a `'`
    before it.

    Args:
        folder: folder of decisions.parquet.
        relabels: whether relabelled faces are in the clean lists, under their new identity.
        unverified: whether the only images of identities are in the clean lists.

    Raises:
        StorageError: if a list cannot be written.
    """
    source = pq.ParquetFile(os.path.join(folder, DECISIONS_FILE))
    summary = ListSummary(root=_find_common_folder(source))
    # Stream the decisions into the lists; identities are numbered as they appear.
    numbers = dict[str, int]()
    listed = {KEEP, UNVERIFIED} if unverified else {KEEP}
    if relabels:
        listed.add(RELABEL)
    try:
        with _ListFiles(folder) as files:
            for batch in source.iter_batches(_LISTED_ROWS, columns=list(_LIST_COLUMNS)):
                for row in batch.to_pylist():
                    _write_row(row, files, numbers, summary, listed)
        with open(os.path.join(folder, "labels.csv"), "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("label", "identity"))
            writer.writerows((number, protect_cell(name)) for name, number in numbers.items())
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error
    return summary


class _ListFiles:
    """The five open list files."""

    def __init__(self, folder: str):
        self._files: list[IO[str]] = []
        self.clean = csv.writer(self._open(folder, "clean.csv"))
        self.relabel = csv.writer(self._open(folder, "relabel.csv"))
        self.review = csv.writer(self._open(folder, "review.csv"))
        self.text = self._open(folder, "clean.txt")
        self.msceleb = self._open(folder, "msceleb.txt")
        self.clean.writerow(("path", "identity", "label", "face_id"))
        self.relabel.writerow(("path", "identity", "suggested", "probability", "face_id"))
        self.review.writerow(("path", "identity", "nearest_identity", "probability", "reason", "face_id"))

    def _open(self, folder: str, name: str) -> IO[str]:
        path = os.path.join(folder, name)
        file = open(path, "w", newline="", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        self._files.append(file)
        return file

    def __enter__(self) -> "_ListFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def _write_row(
    row: dict[str, Any], files: _ListFiles, numbers: dict[str, int], summary: ListSummary, listed: set[str]
) -> None:
    """Write one decision to the lists that it belongs to, and count it.

    Args:
        row: row of decisions.parquet.
        files: the lists.
        numbers: number of each identity so far.
        summary: the counts.
        listed: decisions that the clean lists hold.
    """
    uri = row["uri"]
    is_moved = row["decision"] == RELABEL
    if is_moved:
        names = (protect_cell(row["identity"]), protect_cell(row["suggested"]))
        files.relabel.writerow((protect_cell(uri), *names, f"{row['noise']:.4f}", row["face_id"]))
        summary.relabelled += 1
    if row["decision"] == REVIEW:
        names = (protect_cell(row["identity"]), protect_cell(row["nearest_identity"] or ""))
        files.review.writerow((protect_cell(uri), *names, f"{row['noise']:.4f}", row["reason"], row["face_id"]))
        summary.to_review += 1
    # The clean lists hold kept faces and, on request, relabelled ones under their new name.
    if row["decision"] not in listed:
        return
    name = row["suggested"] if is_moved else row["identity"]
    label = numbers.setdefault(name, len(numbers))
    files.clean.writerow((protect_cell(uri), protect_cell(name), label, row["face_id"]))
    summary.kept += 1
    # Text lists have no quoting, so that some paths do not fit on a line.
    if not _is_listable(uri):
        summary.unlisted += 1
        return
    short = uri.removeprefix(summary.root)
    files.text.write(f"{uri} {label}\n")
    files.msceleb.write(f"{short if _is_listable(short) else uri} {label}\n")


def _is_listable(path: str) -> bool:
    """Tell whether a line `path label` can hold the path: readers strip white space and a byte order mark."""
    # Without a slash, readers take backslashes for slashes.
    is_plain = "/" in path or "\\" not in path
    is_stripped = path == path.strip().lstrip("\ufeff")
    return bool(path) and is_plain and is_stripped and not any(c in path for c in _LINE_BREAKS)


def _find_common_folder(source: pq.ParquetFile) -> str:
    """Find what all uris begin with, up to a slash. It is empty for `file://` URLs: what follows is not a path."""
    root: str | None = None
    for batch in source.iter_batches(_ROWS, columns=["uri"]):
        uris = batch["uri"]
        if len(uris):
            # What the lowest and the highest uri begin with, all between them begin with.
            lowest, highest = (value.as_py() for value in pa.compute.min_max(uris).values())
            root = _find_common_prefix(_find_common_prefix(lowest, highest), lowest if root is None else root)
    if not root or root.startswith("file://"):
        return ""
    return root[: root.rfind("/") + 1]


def _find_common_prefix(left: str, right: str) -> str:
    different = (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(different, min(len(left), len(right)))]
