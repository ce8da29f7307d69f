"""Which faces of a gallery a chip set is made of, chosen in arrays of 12 bytes a face; the table is streamed."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.arrow import vectors
from facepipe.errors import SourceError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.sorted_lookup import look_up_sorted
from facepipe.stages.chips import prominence
from facepipe.training.data.chip_writer import normalise_name
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.data.lists import ListLabels, read_label_list
from facepipe.types import Bool, Int32, Int64

SELECTION_FILES = FACES_FILE, LABELS_FILE, NAMES_FILE = "wanted-faces.npy", "wanted-labels.npy", "wanted-names.arrow"
_CHOICE = ("face_id", "image_id", "uri", "identity", "box", "width", "height")
ROWS = 65536


@dataclass(frozen=True)
class Exclusions:
    """What must not be trained on. images: content hashes; uris: copies of such; names: plain names of identities."""

    images: pa.Array
    uris: pa.Array
    names: frozenset[str] = frozenset()


def select_faces(
    data: DataConfig, gallery: Gallery, excluded: Exclusions, folder: str, wanted: frozenset[str] | None = None
) -> dict[str, int]:
    """Write which faces are wanted, with their names, into a folder; returns how many were left out, by reason.

    wanted: names of images whose subjects are to be taken, labelled or not. Raises SourceError where there is no
    identity at all.
    """
    labels = read_label_list(data.list, data.root) if data.list else None
    only = ImageNames(wanted) if wanted is not None else None
    names = {name: n for n, name in enumerate(labels.names)} if labels else {}
    figures, parts = Counter[str](), [(np.empty(0, np.int64), np.empty(0, np.int32))]
    has_face = "landmarks is not null"
    for table in iterate_whole_images(gallery.batches(_CHOICE, has_face, rows=ROWS)):
        code = _code_identities(table, labels, names) if only is None else _code_wanted(table, only, names)
        rows = np.flatnonzero(code >= 0)
        if labels is None or not labels.by_face:
            rows = np.intersect1d(rows, find_subjects(table))
        figures["left_out: without identity"] += int((code < 0).sum()) if labels is None and only is None else 0
        for column, values, reason in (
            ("image_id", excluded.images, "image of an excluded gallery"),
            ("uri", excluded.uris, "copy of an image of an excluded gallery"),
        ):
            out = pc.is_in(table[column], value_set=values).to_numpy()[rows]
            figures[f"left_out: {reason}"] += int(out.sum())
            rows = rows[~out]
        parts.append((table["face_id"].to_numpy()[rows], code[rows].astype(np.int32)))
    face, label = (np.concatenate(column) for column in zip(*parts, strict=True))
    known = labels.names if labels else list(names)
    if not known or (not len(face) and not figures.total()):
        raise SourceError(_describe_missing_labels(data))
    barred = np.array([normalise_name(name) in excluded.names for name in known], bool)
    face, label = _apply_limits(data, face, label, barred, figures)
    order = np.argsort(face, kind="stable")
    np.save(os.path.join(folder, FACES_FILE), face[order])
    np.save(os.path.join(folder, LABELS_FILE), label[order])
    with pa.ipc.new_file(os.path.join(folder, NAMES_FILE), pa.schema([("name", pa.string())])) as writer:
        writer.write_table(pa.table({"name": pa.array(known, pa.string())}))
    return {name: count for name, count in figures.items() if count} | {"wanted faces": len(face)}


def _describe_missing_labels(data: DataConfig) -> str:
    if data.list:
        return f"no face of the gallery {data.gallery!r} is in the list {data.list!r}: was it made from this gallery?"
    return (
        f"no face in {data.gallery!r} has an identity, and training needs labels: `facepipe embed --identity folder` "
        "takes them from folder names, and data.list from a list"
    )


def _apply_limits(
    data: DataConfig, face: Int64, label: Int32, barred: Bool, figures: Counter[str]
) -> tuple[Int64, Int32]:
    """Without excluded identities, and ones with too few images; of the others no more than allowed, by lowest id."""
    out = barred[label]
    figures["left_out: excluded identity"] += int(out.sum())
    face, label = face[~out], label[~out]
    few = np.bincount(label, minlength=1)[label] < data.min_images
    figures["left_out: identity with too few images"] += int(few.sum())
    face, label = face[~few], label[~few]
    if data.max_images is None:
        return face, label
    order = np.lexsort((face, label))
    face, label = face[order], label[order]
    place = np.arange(len(label)) - np.searchsorted(label, label)
    figures["left_out: more images than data.max_images"] += int((place >= data.max_images).sum())
    return face[place < data.max_images], label[place < data.max_images]


def iterate_whole_images(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables in which no image's rows are cut apart (a part holds them one after the other)."""
    held: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        table = table if held is None else pa.concat_tables([held, table])
        ends = find_image_starts(table["uri"])
        last = int(ends[-1])
        held = table.slice(last)
        if last:
            yield table.slice(0, last).combine_chunks()
    if held is not None:
        yield held.combine_chunks()


def find_image_starts(uris: pa.ChunkedArray) -> Int64:
    """Rows at which another image begins."""
    differ = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1)).to_numpy()
    return np.flatnonzero(np.concatenate([[True], differ]))


def find_subjects(table: pa.Table) -> Int64:
    """The row of each image's subject."""
    starts = find_image_starts(table["uri"])
    image = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, table.num_rows)))
    sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], 1).astype(np.float32)
    order = np.lexsort((-prominence(vectors(table["box"], 4), sizes), image))
    return np.sort(order[starts])


def _code_identities(table: pa.Table, labels: ListLabels | None, names: dict[str, int]) -> Int64:
    """(n,) number of each face's identity; -1 where it has none, or is not in the list."""
    if labels is None:
        coded = table["identity"].combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        numbers = [names.setdefault(name, len(names)) for name in coded.dictionary.to_pylist()]
        return np.array([*numbers, -1], np.int64)[coded.indices.fill_null(len(numbers)).to_numpy()]
    if labels.by_face:
        keys = table["face_id"].to_numpy()
    else:
        keys = np.fromiter((hash64(uri) for uri in table["uri"].to_pylist()), np.uint64)
    return look_up_sorted(labels.keys, labels.codes, keys)


def _code_wanted(table: pa.Table, wanted: ImageNames, names: dict[str, int]) -> Int64:
    names.setdefault("", 0)
    return np.array([0 if wanted.find_name(uri) else -1 for uri in table["uri"].to_pylist()], np.int64)
