"""Read a gallery again and check that it is what was written: checksums, counts, ids, norms."""

import hashlib
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.arrow import to_vectors
from facepipe.errors import StorageError
from facepipe.gallery.commits.log import list_empty_entries
from facepipe.gallery.commits.parts import parse_digest
from facepipe.gallery.deletion_vectors import RowChoice
from facepipe.gallery.marks import NO_MARKS
from facepipe.gallery.table import Gallery
from facepipe.hashing import compute_face_id, hash64_column
from facepipe.schema import OK, STATUSES, UNKNOWN_URI, conform
from facepipe.sources.labels import find_unnormalised
from facepipe.storage.hashtable import HashTable
from facepipe.storage.uploads import Upload, UploadsUnknownError, list_uploads

# Largest distance of a norm from 1 that float32 explains.
_NORM_TOLERANCE = 1e-4
_MAX_PROBLEMS = 100


@dataclass
class Verification:
    """What was checked, and what is wrong.

    Attributes:
        version: Version of the table.
        files: Files read.
        checksummed: Files whose name carries a checksum.
        rows: Rows read.
        images: Images among them.
        faces: Faces among them.
        problems: One line each; empty for a sound gallery.
    """

    version: int
    files: int = 0
    checksummed: int = 0
    rows: int = 0
    images: int = 0
    faces: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Add a problem; the list ends after a hundred."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)
        elif len(self.problems) == _MAX_PROBLEMS:
            self.problems.append("… more problems are not listed")


def verify_gallery(gallery: Gallery) -> Verification:
    """Check every file of the gallery's version. Memory does not grow with the gallery."""
    result = Verification(gallery.version)
    for name in list_empty_entries(gallery.faces_folder):
        result.add(
            f"{name} of the log is empty: a power cut took a commit of an older facepipe. Embed its sources again"
        )
    for upload in _list_abandoned_uploads(gallery.path):
        result.add(
            f"{upload.url}: an upload of it never ended: `facepipe compact`, `index` and reports delete its parts"
        )
    try:
        marked = gallery.marks.images["uri"]
    except StorageError as error:
        result.add(f"{gallery.marks_file}: {error}")
        marked = NO_MARKS.images["uri"]
    # Both tables cover all files, so that repetitions across files are found.
    ranges = gallery.read_text_ranges()
    with closing(HashTable()) as ids, closing(HashTable()) as uris:
        for file in gallery.files():
            result.files += 1
            try:
                table = _read_file(gallery, file, result)
            except (StorageError, OSError, ValueError) as error:
                result.add(f"{file['path']}: cannot be read: {str(error).splitlines()[0]}")
                continue
            _check_text(gallery.path, file["path"], table, ranges[file["path"]], result)
            _check_rows(file["path"], table, ids, uris, gallery.dim, result)
        strays = int((~uris.get(hash64_column(marked))[0]).sum())
        if strays:
            result.add(f"{gallery.marks_file}: {strays} marks of images that the table does not hold")
    return result


def _list_abandoned_uploads(gallery: str) -> list[Upload]:
    """List uploads that never ended; none if the store cannot be asked."""
    with suppress(UploadsUnknownError):
        return [upload for upload in list_uploads(gallery) if upload.is_abandoned]
    return []


def _read_file(gallery: Gallery, file: dict[str, Any], result: Verification) -> pa.Table:
    """Read a file of the table, and check its checksum and its number of rows."""
    data = storage.read(storage.join(gallery.faces_folder, file["path"]))
    digest = parse_digest(file["path"])
    if digest is not None:
        result.checksummed += 1
        if hashlib.sha256(data).hexdigest()[:32] != digest:
            result.add(f"{file['path']}: checksum differs, the file was altered")
    table = pq.ParquetFile(pa.BufferReader(data)).read()
    if table.num_rows != file["num_records"]:
        result.add(f"{file['path']}: {table.num_rows} rows, the log says {file['num_records']}")
    table = conform(table)  # files of older galleries lack newer columns
    deleted = gallery.deleted_rows.get(file["path"])
    if deleted is None:
        return table
    if len(deleted) and deleted[-1] >= table.num_rows:
        result.add(f"{file['path']}: the log deletes row {deleted[-1]}, and there are {table.num_rows}")
        return table
    return table.filter(pa.array(RowChoice(deleted).mask(0, table.num_rows)))


def _check_text(
    gallery: str, path: str, table: pa.Table, ranges: Mapping[str, tuple[str, str]], result: Verification
) -> None:
    """Check that the log's ranges of texts cover what the file holds, and that labels are in normal form."""
    for name, (low, high) in ranges.items():
        limits = pc.min_max(table[name]).as_py()
        if limits["min"] is not None and not (low <= limits["min"] and limits["max"] <= high):
            result.add(f"{path}: the range of {name} in the log is wrong: `facepipe compact --all {gallery}` mends it")
    labels = find_unnormalised(table["identity"])
    if labels:
        result.add(
            f"{path}: {len(labels)} labels are not in Unicode's normal form C: `facepipe compact --all {gallery}` "
            "mends them"
        )


def _check_rows(path: str, table: pa.Table, ids: HashTable, uris: HashTable, dim: int, result: Verification) -> None:
    """Check the rows of one file; ids and uris of earlier files are in the hash tables."""
    first_rows = table.filter(pc.fill_null(pc.equal(table["face_index"], 0), True))
    faces = table.filter(pc.is_valid(table["face_id"]))
    result.rows += table.num_rows
    result.images += first_rows.num_rows
    result.faces += faces.num_rows
    # Each check is a mask of wrong rows (n,).
    checks = {
        "rows with an unknown status": pc.invert(pc.is_in(table["status"], pa.array(STATUSES))),
        "faces without status ok, or rows with it and no face": pc.xor(
            pc.equal(table["status"], OK), pc.is_valid(table["face_id"])
        ),
        "faces without an embedding, or embeddings without a face": pc.xor(
            pc.is_valid(table["embedding"]), pc.is_valid(table["face_id"])
        ),
    }
    for problem, is_wrong in checks.items():
        count = pc.sum(is_wrong).as_py() or 0
        if count:
            result.add(f"{path}: {count} {problem}")
    _check_faces(path, faces, ids, dim, result)
    _check_images(path, table, first_rows, uris, result)


def _check_faces(path: str, faces: pa.Table, ids: HashTable, dim: int, result: Verification) -> None:
    """Check that face ids are unique and belong to their image, and that embeddings have `dim` numbers and norm 1."""
    if not faces.num_rows:
        return
    repeated = int((~ids.add(faces["face_id"].to_numpy().astype(np.uint64))).sum())
    if repeated:
        result.add(f"{path}: {repeated} face ids that occur twice")
    # Face ids are hashes of image and ordinal, so they can be computed again. A moved image has those of its first uri.
    columns = (faces[name].to_pylist() for name in ("face_id", "uri", "former_uris", "image_id", "face_index"))
    foreign = 0
    for face_id, uri, former_uris, image_id, index in zip(*columns, strict=True):
        first_uri = former_uris[0] if former_uris else uri
        if first_uri != UNKNOWN_URI:
            foreign += face_id != compute_face_id(first_uri, image_id or "", index)
    if foreign:
        result.add(f"{path}: {foreign} face ids that do not belong to their image")
    if set(pc.list_value_length(faces["embedding"]).to_pylist()) - {dim}:
        result.add(f"{path}: embeddings that are not {dim}-D")
        return
    norms = np.linalg.norm(to_vectors(faces["embedding"], dim), axis=1)
    wrong = int((~(np.abs(norms - 1) < _NORM_TOLERANCE)).sum())
    if wrong:
        result.add(f"{path}: {wrong} embeddings whose norm is not 1")


def _check_images(path: str, table: pa.Table, first_rows: pa.Table, uris: HashTable, result: Verification) -> None:
    """Check that images are unique, and that the faces of each are numbered from 0 without a gap."""
    if first_rows.num_rows:
        repeated = int((~uris.add(hash64_column(first_rows["uri"]))).sum())
        if repeated:
            result.add(f"{path}: {repeated} images that occur twice")
    faces = table.filter(pc.is_valid(table["face_index"])).select(["uri", "face_index"])
    if faces.num_rows:
        # Ordinals from 0 without a gap: as many different ones as the largest plus 1.
        groups = faces.group_by("uri").aggregate([("face_index", "max"), ("face_index", "count_distinct")])
        gaps = pc.sum(pc.not_equal(pc.add(groups["face_index_max"], 1), groups["face_index_count_distinct"])).as_py()
        if gaps:
            result.add(f"{path}: {gaps} images with missing or repeated face ordinals")
