"""Choose the faces of a gallery that a projection is fitted and measured on, and cut their chips from the images.

The choice depends on the seed, ids and labels only, not on the order of the table.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.arrow import view_buffers
from facepipe.errors import EvaluationError
from facepipe.evaluation.pairs import read_subject_rows
from facepipe.evaluation.pairs_file import Pair, read_pairs
from facepipe.evaluation.projected import PairRows
from facepipe.gallery import Gallery
from facepipe.hashing import hash64
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.schema import OK, WORK_ITEM
from facepipe.sources.relocate import ImageLocator
from facepipe.stages import Align, Decode, Read
from facepipe.stages.chain import Chain
from facepipe.stages.chips import GIVEN_COLUMNS, KnownFaces
from facepipe.types import Int64, UInt8, UInt64

_MAX_MEASURED = 2_000  # faces: two million pairs
_FACES_PER_DIMENSION = 10  # enough to fit without the faces of the pairs
_BLOCK_IMAGES = 64
_WITH_FACE = "landmarks is not null"
_COLUMNS = ("face_id", "image_id", "uri", "box", "landmarks", "det_score", "turn")


class _LowestKeys:
    """The ids with the n lowest keys so far."""

    def __init__(self, n: int):
        self._n = n
        self._keys = np.empty(0, np.uint64)
        self._ids = np.empty(0, np.int64)

    def add(self, keys: UInt64, ids: Int64) -> None:
        """Add ids (m,) with their keys (m,)."""
        self._keys = np.concatenate([self._keys, keys])
        self._ids = np.concatenate([self._ids, ids])
        # Sort only if twice as many have gathered, so that memory is bounded and sorting is rare.
        if len(self._keys) > 2 * self._n:
            self._trim()

    def _trim(self) -> None:
        # Ties of keys are broken by id, so that the order of the table does not matter.
        order = np.lexsort((self._ids, self._keys))[: self._n]
        self._keys = self._keys[order]
        self._ids = self._ids[order]

    def get_ids(self) -> Int64:
        """Return the ids, ascending."""
        return np.sort(self.get_sorted()[1])

    def get_sorted(self) -> tuple[UInt64, Int64]:
        """Return the keys, ascending, and their ids."""
        self._trim()
        return self._keys, self._ids


@dataclass(frozen=True)
class FaceSample:
    """The faces to fit and to measure on.

    Attributes:
        fitted: face ids to fit on, ascending, (n,).
        measured: number of the person of each face to measure on, by face id.
        pairs: pairs of a pairs file; empty without a file.
        faces_by_name: face id of each image of the pairs file, by its name.
    """

    fitted: Int64
    measured: dict[int, int]
    pairs: list[Pair] = field(default_factory=list)
    faces_by_name: dict[str, int] = field(default_factory=dict)

    @property
    def all(self) -> Int64:
        """Ids of all faces to embed, ascending."""
        return np.union1d(self.fitted, np.array(list(self.measured), np.int64))

    def get_persons(self, faces: list[int]) -> Int64:
        """Return the number of the person of each face, (n,)."""
        return np.array([self.measured[face] for face in faces], np.int64)

    def build_pairs(self, faces: list[int]) -> PairRows | None:
        """Convert the pairs file's pairs to rows of `faces`, or return None without a file."""
        if not self.pairs:
            return None
        rows = {face: row for row, face in enumerate(faces)}

        def find_row(name: str) -> int:
            return rows.get(self.faces_by_name.get(name, 0), -1)

        return PairRows(
            left=np.array([find_row(pair.left) for pair in self.pairs], np.int64),
            right=np.array([find_row(pair.right) for pair in self.pairs], np.int64),
            same=np.array([pair.same for pair in self.pairs]),
            folds=np.array([pair.fold for pair in self.pairs]),
        )


def choose_faces(
    gallery: Gallery, *, dim: int, count: int, held: float, seed: int, pairs_file: str | None
) -> FaceSample:
    """Choose the faces to fit and to measure on.

    Faces of a pairs file are fitted on only if too few others are left.

    Args:
        gallery: gallery of the faces.
        dim: dimensions of the model.
        count: maximum number of faces to fit on.
        held: share of the persons to hold out for measuring, without a pairs file.
        seed: random seed.
        pairs_file: file of the pairs to measure on.

    Raises:
        EvaluationError: The gallery does not hold the file's images.
    """
    if pairs_file is not None:
        return _choose_for_pairs(gallery, dim, count, seed, pairs_file)
    # Lowest hashes are a random sample that needs one pass and no order.
    fitted = _LowestKeys(count)
    measured = _LowestKeys(_MAX_MEASURED)
    for ids, labels in _iterate_labels(gallery):
        # The key of a face is its person's hash, so that persons are held out as a whole.
        person_keys = np.array([0 if name is None else hash64(f"{seed}:{name}") for name in labels], np.uint64)
        has_label = np.array([name is not None for name in labels], bool)
        is_held = has_label & (person_keys < np.uint64(int(held * 2**64)))
        fitted.add(_hash_ids(ids[~is_held], seed), ids[~is_held])
        measured.add(person_keys[is_held], ids[is_held])
    # Number the persons 0, 1, ... by their keys.
    person_keys, ids = measured.get_sorted()
    persons = np.unique(person_keys, return_inverse=True)[1]
    return FaceSample(fitted.get_ids(), dict(zip(ids.tolist(), persons.tolist(), strict=True)))


def _choose_for_pairs(gallery: Gallery, dim: int, count: int, seed: int, path: str) -> FaceSample:
    """Choose the faces of a pairs file to measure on, and others to fit on."""
    # Every image of the file must be in the gallery, but not every image needs a face.
    pairs = read_pairs(path)
    names = {name for pair in pairs for name in (pair.left, pair.right)}
    rows = read_subject_rows(gallery, names, ["face_id"])
    absent = sorted(names - rows.keys())
    if absent:
        raise EvaluationError(
            f"{len(absent)} images of {path!r} are not in the gallery, such as {', '.join(absent[:3])}"
        )
    kinds = {bool(pair.same) for pair in pairs}
    if kinds != {False, True}:
        raise EvaluationError(f"the pairs of {path!r} are all of one kind: list pairs of one person and of two")
    faces_by_name = {name: int(row["face_id"]) for name, row in rows.items() if row["face_id"] is not None}
    # The pairs say who is the same person, so persons need no numbers here.
    measured = dict.fromkeys(faces_by_name.values(), 0)
    # Sample from the faces outside the pairs, and from all faces in case those are too few.
    others = _LowestKeys(count)
    everything = _LowestKeys(count)
    for ids, _ in _iterate_labels(gallery):
        is_other = ~np.isin(ids, list(measured))
        others.add(_hash_ids(ids[is_other], seed), ids[is_other])
        everything.add(_hash_ids(ids, seed), ids)
    fitted = others.get_ids()
    if len(fitted) < _FACES_PER_DIMENSION * dim:
        fitted = everything.get_ids()
    return FaceSample(fitted, measured, pairs, faces_by_name)


def _iterate_labels(gallery: Gallery) -> Iterator[tuple[Int64, list[str | None]]]:
    for batch in gallery.batches(["face_id", "identity"], _WITH_FACE):
        yield batch["face_id"].to_numpy(), batch["identity"].to_pylist()


def _hash_ids(ids: Int64, seed: int) -> UInt64:
    """Hash each id with the seed, by the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    # Arithmetic is modulo 2**64; overflow is intended.
    x = ids.view(np.uint64) + np.uint64(hash64(str(seed)))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class FaceCutter:
    """Cuts a gallery's faces for another embedder, with the gallery's boxes and landmarks and without a detector."""

    def __init__(self, gallery: Gallery, embedder: str, read: Read, decode: Decode):
        self._gallery = gallery
        self._size = find_chip_layout(embedder).size
        align = Align(embedder=embedder, detector=gallery.contract.detector, thumbs=False)
        self._chain = Chain((read, decode, KnownFaces(), align))
        self._chain.setup()

    def cut_chips(self, faces: Int64, images: Counter[str]) -> Iterator[tuple[Int64, UInt8]]:
        """Cut chips block by block.

        Args:
            faces: ids of the faces, (m,).
            images: gets the counts of images by status.

        Yields:
            Face ids (n,), and their chips (n, h, w, 3).
        """
        locator = ImageLocator()
        for batch in self._gallery.batches(_COLUMNS, _WITH_FACE):
            is_wanted = np.isin(batch["face_id"].to_numpy(), faces)
            # Group the wanted faces by image, so that each image is read once.
            rows_by_image: dict[str, list[dict[str, Any]]] = {}
            for row in batch.filter(pa.array(is_wanted)).to_pylist():
                rows_by_image.setdefault(row["uri"], []).append(row)
            groups = list(rows_by_image.values())
            for start in range(0, len(groups), _BLOCK_IMAGES):
                yield self._cut_block(build_face_table(groups[start : start + _BLOCK_IMAGES], locator), images)

    def _cut_block(self, table: pa.Table, images: Counter[str]) -> tuple[Int64, UInt8]:
        """Cut the chips of a block of images, and count the images."""
        result = self._chain(table)
        statuses = result["status"].to_pylist()
        indices = result["face_index"].to_pylist()
        # An image has one row per face; its first row counts it.
        images.update(status for status, n in zip(statuses, indices, strict=True) if status != OK or n == 0)
        # A chip is a flat buffer of its pixels. Faces that could not be cut have none.
        width, height = self._size
        ids = []
        chips = []
        rows = zip(result["given_faces"].to_pylist(), indices, view_buffers(result["chip"]), strict=True)
        for face_ids, index, view in rows:
            if view is not None:
                ids.append(face_ids[index])
                chips.append(np.frombuffer(view, np.uint8).reshape(height, width, 3))
        stack = np.stack(chips) if chips else np.empty((0, height, width, 3), np.uint8)
        return np.array(ids, np.int64), stack


def build_face_table(images: list[list[dict[str, Any]]], locator: ImageLocator) -> pa.Table:
    """Build the table that the stage `KnownFaces` takes: one row per image, with its faces.

    Args:
        images: the gallery's rows of each image.
        locator: finds the images' files.
    """
    items = [(*locator.locate_image(faces[0]["uri"]), None) for faces in images]
    arrays = [pa.array(column, f.type) for column, f in zip(zip(*items, strict=True), WORK_ITEM, strict=True)]
    work = pa.table(arrays, WORK_ITEM)
    # Lists are flat: 4 numbers per box and 10 per face for landmarks. Names are not needed.
    known_faces = {
        "given_image": [faces[0]["image_id"] for faces in images],
        "given_faces": [[face["face_id"] for face in faces] for faces in images],
        "given_identities": [[""] * len(faces) for faces in images],
        "given_boxes": [[x for face in faces for x in face["box"]] for faces in images],
        "given_points": [[x for face in faces for x in face["landmarks"]] for faces in images],
        "given_scores": [[face["det_score"] for face in faces] for faces in images],
        "given_turns": [[float(face["turn"] or 0) for face in faces] for faces in images],
    }
    item_columns = {name: work[name] for name in WORK_ITEM.names}
    face_columns = {name: pa.array(known_faces[name], GIVEN_COLUMNS.field(name).type) for name in GIVEN_COLUMNS.names}
    return pa.table({**item_columns, **face_columns})
