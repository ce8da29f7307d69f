"""Clean lists in the layouts people train from, and the decision table; streamed, whatever the names hold."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from facepipe.curation.cleaning.decide import DECISIONS, KEEP, REASONS, RELABEL, Verdicts
from facepipe.curation.graph import GraphInfo
from facepipe.curation.graph.nodes import Nodes
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.storage import describe_error
from facepipe.types import Float32, Int64

DECISION_ROWS = pa.schema(
    [
        ("face_id", pa.int64()),
        ("uri", pa.string()),
        ("identity", pa.string()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("suggested", pa.string()),
        ("noise", pa.float32()),  # probability that the label is wrong
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
_ROWS = 65536
_BREAKS = ("\n", "\r")


@dataclass
class Written:
    """What is in the lists.

    unlisted: kept images whose path no text list can hold; they are in the CSV
    root: what paths in msceleb.txt are relative to
    """

    kept: int = 0
    relabelled: int = 0
    unlisted: int = 0
    root: str = ""


def decision_rows(
    gallery: Gallery, nodes: Nodes, found: Verdicts, names: pa.Array, info: GraphInfo
) -> Iterator[pa.Table]:
    """Rows of decisions.parquet in the gallery's order, for faces that have a label."""
    columns = ["face_id", "uri", "identity", "face_px", "sharpness", "det_score"]
    for batch in gallery.batches(columns, rows=_ROWS):
        faces = pa.Table.from_batches([batch.filter(batch["face_id"].is_valid())])
        at = nodes.find(faces["face_id"].to_numpy())
        judged = (at >= 0) & (found.decision[at] >= 0)
        yield _rows(faces.filter(pa.array(judged)), at[judged], found, names, info)


def _rows(faces: pa.Table, at: Int64, found: Verdicts, names: pa.Array, info: GraphInfo) -> pa.Table:
    distance, nearest = (_distances(info, values[at]) for values in (found.own, found.other_similarity))
    other = pa.array(found.other[at], mask=found.other[at] < 0)
    moved = found.decision[at] == DECISIONS.index(RELABEL)
    columns: dict[str, Any] = {
        **{name: faces[name] for name in ("face_id", "uri", "identity", "face_px", "sharpness", "det_score")},
        "decision": pa.array(DECISIONS, pa.string()).take(pa.array(found.decision[at])),
        "reason": pa.array(REASONS, pa.string()).take(pa.array(found.reason[at])),
        "suggested": names.take(pa.array(found.other[at], mask=~moved)),
        "noise": found.noise[at],
        "distance": _nullable(distance),
        "rest": found.rest[at],
        "nearest_identity": names.take(other),
        "nearest_distance": _nullable(nearest),
        "margin": _nullable(nearest - distance),
    }
    return pa.table({name: columns[name] for name in DECISION_ROWS.names}).cast(DECISION_ROWS)


def _distances(info: GraphInfo, similarity: Float32) -> Float32:
    return np.sqrt(np.maximum(0, 2 - 2 * (similarity + np.float32(info.mean_density))))


def _nullable(values: Float32) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def write_lists(folder: str, relabels: bool) -> Written:
    """From decisions.parquet of a folder: clean.csv, clean.txt and msceleb.txt (path and number), labels.csv, and
    relabel.csv. With `relabels` the relabelled are in the clean lists, under their new identity."""
    source = pq.ParquetFile(os.path.join(folder, "decisions.parquet"))
    written, numbers = Written(root=_common_folder(source)), dict[str, int]()
    try:
        with _Lists(folder) as lists:
            for batch in source.iter_batches(
                _ROWS, columns=["face_id", "uri", "identity", "decision", "suggested", "noise"]
            ):
                for row in batch.to_pylist():
                    _write(row, lists, numbers, written, relabels)
        with open(os.path.join(folder, "labels.csv"), "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("label", "identity"), *((n, name) for name, n in numbers.items())])
    except OSError as error:
        raise StorageError(f"cannot write {folder!r}: {describe_error(error)}") from error
    return written


class _Lists:
    """The four open list files."""

    def __init__(self, folder: str):
        names = ("clean.csv", "relabel.csv", "clean.txt", "msceleb.txt")
        self._files: list[IO[str]] = [
            open(os.path.join(folder, name), "w", newline="", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
            for name in names
        ]
        self.clean, self.relabel = (csv.writer(file) for file in self._files[:2])
        self.text, self.msceleb = self._files[2:]
        self.clean.writerow(("path", "identity", "label", "face_id"))
        self.relabel.writerow(("path", "identity", "suggested", "probability", "face_id"))

    def __enter__(self) -> "_Lists":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


def _write(row: dict[str, Any], lists: _Lists, numbers: dict[str, int], written: Written, relabels: bool) -> None:
    moved = row["decision"] == RELABEL
    if moved:
        lists.relabel.writerow((row["uri"], row["identity"], row["suggested"], f"{row['noise']:.4f}", row["face_id"]))
        written.relabelled += 1
    if row["decision"] != KEEP and not (moved and relabels):
        return
    name, uri = row["suggested"] if moved else row["identity"], row["uri"]
    label = numbers.setdefault(name, len(numbers))
    lists.clean.writerow((uri, name, label, row["face_id"]))
    written.kept += 1
    if not _plain(uri):
        written.unlisted += 1
        return
    short = uri.removeprefix(written.root)
    lists.text.write(f"{uri} {label}\n")
    lists.msceleb.write(f"{short if _plain(short) else uri} {label}\n")


def _plain(path: str) -> bool:
    """Whether a line `path label` can hold it: readers strip white space and a byte order mark."""
    return bool(path) and path == path.strip().lstrip("\ufeff") and not any(c in path for c in _BREAKS)


def _common_folder(source: pq.ParquetFile) -> str:
    """What all uris begin with, up to a slash; nothing for `file://` URLs, whose ends are no paths."""
    root: str | None = None
    for batch in source.iter_batches(_ROWS, columns=["uri"]):
        uris = batch["uri"]
        if len(uris):
            lowest, highest = (value.as_py() for value in pa.compute.min_max(uris).values())
            root = _common(_common(lowest, highest), lowest if root is None else root)
    return "" if not root or root.startswith("file://") else root[: root.rfind("/") + 1]


def _common(left: str, right: str) -> str:
    """What two texts begin with."""
    differ = (n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return left[: next(differ, min(len(left), len(right)))]
