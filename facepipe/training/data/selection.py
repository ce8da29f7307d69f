"""Select the faces of a gallery for a chip set. The table is streamed; the selection takes 12 bytes per face."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.arrow import to_vectors
from facepipe.errors import SourceError
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.sorted_lookup import look_up_sorted
from facepipe.sources.labels import normalise_name
from facepipe.stages.chips import compute_prominence
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.data.lists import ListLabels, read_label_list
from facepipe.types import Bool, Int32, Int64

FACES_FILE = "wanted-faces.npy"
LABELS_FILE = "wanted-labels.npy"
NAMES_FILE = "wanted-names.arrow"
SELECTION_FILES = (FACES_FILE, LABELS_FILE, NAMES_FILE)
ROWS = 65536
_COLUMNS = ("face_id", "image_id", "uri", "identity", "box", "width", "height")


@dataclass(frozen=True)
class Exclusions:
    """What must not be trained on.

    Attributes:
        images: content hashes of images.
        uris: uris of copies of such images.
        names: normalised names of identities.
    """

    images: pa.Array
    uris: pa.Array
    names: frozenset[str] = frozenset()


def select_faces(
    data: DataConfig,
    gallery: Gallery,
    exclusions: Exclusions,
    folder: str,
    image_names: frozenset[str] | None = None,
) -> dict[str, int]:
    """Select faces with their names, and write the selection into a folder.

    Args:
        data: what to train on.
        gallery: gallery that holds the faces.
        exclusions: what must not be trained on.
        folder: folder for the files of the selection.
        image_names: names of images whose subjects to select, labelled or not; default: all faces with a label.

    Returns:
        Counts of faces by name: those left out, by reason, and those selected.

    Raises:
        SourceError: There is no identity at all.
    """
    labels = read_label_list(data.list, data.root) if data.list else None
    names_to_find = ImageNames(image_names) if image_names is not None else None
    # Numbers of names: those of the list, or names of the gallery as they appear.
    numbers = {name: n for n, name in enumerate(labels.names)} if labels else {}
    figures = Counter[str]()
    face_parts = [np.empty(0, np.int64)]
    label_parts = [np.empty(0, np.int32)]
    for table in iterate_whole_images(gallery.batches(_COLUMNS, "landmarks is not null", rows=ROWS)):
        # Keep faces with an identity. If the labels are of images, keep each image's subject.
        if names_to_find is None:
            codes = _code_identities(table, labels, numbers)
        else:
            codes = _code_wanted(table, names_to_find, numbers)
        rows = np.flatnonzero(codes >= 0)
        if labels is None or not labels.by_face:
            rows = np.intersect1d(rows, find_subjects(table))
        if labels is None and names_to_find is None:
            figures["left_out: without identity"] += int((codes < 0).sum())
        # Leave out what must not be trained on.
        for column, values, reason in (
            ("image_id", exclusions.images, "image of an excluded gallery"),
            ("uri", exclusions.uris, "copy of an image of an excluded gallery"),
        ):
            is_excluded = pc.is_in(table[column], value_set=values).to_numpy()[rows]
            figures[f"left_out: {reason}"] += int(is_excluded.sum())
            rows = rows[~is_excluded]
        face_parts.append(table["face_id"].to_numpy()[rows])
        label_parts.append(codes[rows].astype(np.int32))
    faces = np.concatenate(face_parts)
    face_labels = np.concatenate(label_parts)
    names = labels.names if labels else list(numbers)
    if not names or (not len(faces) and not figures.total()):
        raise SourceError(_describe_missing_labels(data))
    is_excluded_name = np.array([normalise_name(name) in exclusions.names for name in names], bool)
    # Limits are applied to all faces, because an identity may be spread over the table.
    faces, face_labels = _apply_limits(data, faces, face_labels, is_excluded_name, figures)
    # Write the selection by ascending face id, so that ids can be looked up.
    order = np.argsort(faces, kind="stable")
    np.save(os.path.join(folder, FACES_FILE), faces[order])
    np.save(os.path.join(folder, LABELS_FILE), face_labels[order])
    with pa.ipc.new_file(os.path.join(folder, NAMES_FILE), pa.schema([("name", pa.string())])) as writer:
        writer.write_table(pa.table({"name": pa.array(names, pa.string())}))
    return {name: count for name, count in figures.items() if count} | {"wanted faces": len(faces)}


def _describe_missing_labels(data: DataConfig) -> str:
    if data.list:
        return f"no face of the gallery {data.gallery!r} is in the list {data.list!r}: was it made from this gallery?"
    return (
        f"no face in {data.gallery!r} has an identity, but training needs labels: `facepipe embed --identity folder` "
        "takes them from folder names, and data.list from a list"
    )


def _apply_limits(
    data: DataConfig, faces: Int64, labels: Int32, is_excluded_name: Bool, figures: Counter[str]
) -> tuple[Int64, Int32]:
    """Leave out excluded identities, those with too few images, and the images that exceed the maximum.

    The faces with the lowest ids are kept.
    """
    # Leave out excluded identities first, so that they do not count towards the limits.
    is_excluded = is_excluded_name[labels]
    figures["left_out: excluded identity"] += int(is_excluded.sum())
    faces = faces[~is_excluded]
    labels = labels[~is_excluded]
    has_few = np.bincount(labels, minlength=1)[labels] < data.min_images
    figures["left_out: identity with too few images"] += int(has_few.sum())
    faces = faces[~has_few]
    labels = labels[~has_few]
    if data.max_images is None:
        return faces, labels
    # Order by label and face id, so that the first faces of each label are kept.
    order = np.lexsort((faces, labels))
    faces = faces[order]
    labels = labels[order]
    position = np.arange(len(labels)) - np.searchsorted(labels, labels)
    figures["left_out: more images than data.max_images"] += int((position >= data.max_images).sum())
    is_kept = position < data.max_images
    return faces[is_kept], labels[is_kept]


def iterate_whole_images(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Regroup batches to tables that hold all rows of each of their images. An image's rows must be consecutive."""
    rest: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        if rest is not None:
            table = pa.concat_tables([rest, table])
        # The last image may continue in the next batch.
        last_start = int(find_image_starts(table["uri"])[-1])
        rest = table.slice(last_start)
        if last_start:
            yield table.slice(0, last_start).combine_chunks()
    if rest is not None:
        yield rest.combine_chunks()


def find_image_starts(uris: pa.ChunkedArray) -> Int64:
    """Find the rows at which a new image begins."""
    differs = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1)).to_numpy()
    return np.flatnonzero(np.concatenate([[True], differs]))


def find_subjects(table: pa.Table) -> Int64:
    """Find the row of each image's subject, the face with the greatest prominence."""
    # Number the image of each row, and sort rows by image with the most prominent face first.
    starts = find_image_starts(table["uri"])
    image = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, table.num_rows)))
    sizes = np.stack([table[name].to_numpy() for name in ("width", "height")], 1).astype(np.float32)
    order = np.lexsort((-compute_prominence(to_vectors(table["box"], 4), sizes), image))
    return np.sort(order[starts])


def _code_identities(table: pa.Table, labels: ListLabels | None, numbers: dict[str, int]) -> Int64:
    """Assign a number to the identity of each face, (n,); -1 if it has none or is not in the list.

    Args:
        table: faces.
        labels: labels of a list, or None to use the gallery's own.
        numbers: number of each name; the gallery's names are added.
    """
    if labels is None:
        # Encode each distinct name once; a face without a name gets the place behind the last code.
        coded = table["identity"].combine_chunks().dictionary_encode()
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        codes = [numbers.setdefault(name, len(numbers)) for name in coded.dictionary.to_pylist()]
        return np.array([*codes, -1], np.int64)[coded.indices.fill_null(len(codes)).to_numpy()]
    # Keys of the faces in the list's own kind: face ids, or hashes of uris.
    if labels.by_face:
        keys = table["face_id"].to_numpy()
    else:
        keys = np.fromiter((hash64(uri) for uri in table["uri"].to_pylist()), np.uint64)
    return look_up_sorted(labels.keys, labels.codes, keys)


def _code_wanted(table: pa.Table, names: ImageNames, numbers: dict[str, int]) -> Int64:
    """Return 0 for faces of images with one of the names, and -1 for others, (n,)."""
    numbers.setdefault("", 0)
    return np.array([0 if names.find_name(uri) else -1 for uri in table["uri"].to_pylist()], np.int64)
