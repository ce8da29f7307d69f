"""Which faces of a gallery a projection is fitted and measured on, and their chips, cut anew from the images.

Which faces are taken depends on the seed, ids and labels alone, not on the order of the table.
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

_MEASURED = 2_000  # faces: two million pairs
_ENOUGH = 10  # faces a dimension
_IMAGES = 64  # of a block
_COLUMNS = ("face_id", "image_id", "uri", "box", "landmarks", "det_score")


class _LowestKeys:
    """The ids of the n lowest keys that have come by."""

    def __init__(self, n: int):
        self._n = n
        self._keys, self._ids = np.empty(0, np.uint64), np.empty(0, np.int64)

    def add(self, keys: UInt64, ids: Int64) -> None:
        self._keys, self._ids = np.concatenate([self._keys, keys]), np.concatenate([self._ids, ids])
        if len(self._keys) > 2 * self._n:
            self._cut()

    def _cut(self) -> None:
        order = np.lexsort((self._ids, self._keys))[: self._n]
        self._keys, self._ids = self._keys[order], self._ids[order]

    def get_ids(self) -> Int64:
        """Ascending."""
        return np.sort(self.get_sorted()[1])

    def get_sorted(self) -> tuple[UInt64, Int64]:
        """Keys, ascending, and their ids."""
        self._cut()
        return self._keys, self._ids


@dataclass(frozen=True)
class FaceSample:
    """Face ids (n,), ascending, to fit on; to measure on, with the person's number; and a pairs file's pairs."""

    fitted: Int64
    measured: dict[int, int]
    given: list[Pair] = field(default_factory=list)
    named: dict[str, int] = field(default_factory=dict)

    @property
    def all(self) -> Int64:
        """Every face that must be embedded, ascending."""
        return np.union1d(self.fitted, np.array(list(self.measured), np.int64))

    def get_persons(self, faces: list[int]) -> Int64:
        """(n,) number of the person of each face."""
        return np.array([self.measured[face] for face in faces], np.int64)

    def build_pairs(self, faces: list[int]) -> PairRows | None:
        """The pairs file's pairs as rows of `faces`; None where no file was given."""
        if not self.given:
            return None
        rows = {face: n for n, face in enumerate(faces)}
        sides = [[rows.get(self.named.get(name, 0), -1) for name in (p.left, p.right)] for p in self.given]
        left, right = np.array(sides, np.int64).T
        return PairRows(left, right, np.array([p.same for p in self.given]), np.array([p.fold for p in self.given]))


def choose_faces(gallery: Gallery, dim: int, faces: int, held: float, seed: int, pairs: str | None) -> FaceSample:
    """What to fit on, at most `faces`, and what to measure on: a pairs file's faces, else those of held out people.

    Faces of a pairs file are fitted on only where too few others are left. Raises EvaluationError where the gallery
    does not hold the file's images.
    """
    if pairs is not None:
        return _choose_for_pairs(gallery, dim, faces, seed, pairs)
    fitted, measured = _LowestKeys(faces), _LowestKeys(_MEASURED)
    for ids, labels in _iterate_labels(gallery):
        keys = np.array([0 if name is None else hash64(f"{seed}:{name}") for name in labels], np.uint64)
        out = np.array([name is not None for name in labels], bool) & (keys < np.uint64(int(held * 2**64)))
        fitted.add(_hash_ids(ids[~out], seed), ids[~out])
        measured.add(keys[out], ids[out])
    people, ids = measured.get_sorted()
    numbers = np.unique(people, return_inverse=True)[1]
    return FaceSample(fitted.get_ids(), dict(zip(ids.tolist(), numbers.tolist(), strict=True)))


def _choose_for_pairs(gallery: Gallery, dim: int, faces: int, seed: int, path: str) -> FaceSample:
    given = read_pairs(path)
    names = {name for pair in given for name in (pair.left, pair.right)}
    rows = read_subject_rows(gallery, names, ["face_id"])
    if absent := sorted(names - rows.keys()):
        raise EvaluationError(
            f"{len(absent)} images of {path!r} are not in the gallery, such as {', '.join(absent[:3])}"
        )
    if all(p.same for p in given) or not any(p.same for p in given):
        raise EvaluationError(f"the pairs of {path!r} are all of one kind: both same and different ones are needed")
    named = {name: int(row["face_id"]) for name, row in rows.items() if row["face_id"] is not None}
    measured = dict.fromkeys(named.values(), 0)
    others, every = _LowestKeys(faces), _LowestKeys(faces)
    for ids, _ in _iterate_labels(gallery):
        free = ~np.isin(ids, list(measured))
        others.add(_hash_ids(ids[free], seed), ids[free])
        every.add(_hash_ids(ids, seed), ids)
    fitted = others.get_ids()
    return FaceSample(fitted if len(fitted) >= _ENOUGH * dim else every.get_ids(), measured, given, named)


def _iterate_labels(gallery: Gallery) -> Iterator[tuple[Int64, list[str | None]]]:
    for batch in gallery.batches(["face_id", "identity"], "landmarks is not null"):
        yield batch["face_id"].to_numpy(), batch["identity"].to_pylist()


def _hash_ids(ids: Int64, seed: int) -> UInt64:
    """A hash of each id and the seed (the finaliser of splitmix64; Steele et al., OOPSLA 2014)."""
    x = ids.view(np.uint64) + np.uint64(hash64(str(seed)))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class FaceCutter:
    """Faces that a gallery holds, cut anew for another embedder: its boxes and landmarks, no detector."""

    def __init__(self, gallery: Gallery, embedder: str, read: Read, decode: Decode):
        self._gallery, self._size = gallery, find_chip_layout(embedder).size
        align = Align(embedder=embedder, detector=gallery.contract.detector, thumbs=False)
        self._chain = Chain((read, decode, KnownFaces(), align))
        self._chain.setup()

    def cut_chips(self, faces: Int64, images: Counter[str]) -> Iterator[tuple[Int64, UInt8]]:
        """(ids (n,), chips (n, h, w, 3)) block by block; `images` counts what became of the images, by status."""
        places = ImageLocator()
        for batch in self._gallery.batches(_COLUMNS, "landmarks is not null"):
            mine = batch.filter(pa.array(np.isin(batch["face_id"].to_numpy(), faces))).to_pylist()
            found = dict[str, list[dict[str, Any]]]()
            for row in mine:
                found.setdefault(row["uri"], []).append(row)
            groups = list(found.values())
            for at in range(0, len(groups), _IMAGES):
                yield self._cut_block(_build_table(groups[at : at + _IMAGES], places), images)

    def _cut_block(self, table: pa.Table, images: Counter[str]) -> tuple[Int64, UInt8]:
        made = self._chain(table)
        status, index = made["status"].to_pylist(), made["face_index"].to_pylist()
        images.update(s for s, n in zip(status, index, strict=True) if s != OK or n == 0)
        rows = zip(made["given_faces"].to_pylist(), index, view_buffers(made["chip"]), strict=True)
        cut = [(ids[n], view) for ids, n, view in rows if view is not None]
        width, height = self._size
        chips = [np.frombuffer(view, np.uint8).reshape(height, width, 3) for _, view in cut]
        return np.array([n for n, _ in cut], np.int64), np.stack(chips) if chips else np.empty(
            (0, height, width, 3), np.uint8
        )


def _build_table(images: list[list[dict[str, Any]]], places: ImageLocator) -> pa.Table:
    """One row an image, with its faces as the stage Given wants them."""
    items = [(*places.locate_image(faces[0]["uri"]), None) for faces in images]
    work = pa.table([pa.array(c, f.type) for c, f in zip(zip(*items, strict=True), WORK_ITEM, strict=True)], WORK_ITEM)
    given = {
        "given_image": [faces[0]["image_id"] for faces in images],
        "given_faces": [[face["face_id"] for face in faces] for faces in images],
        "given_identities": [[""] * len(faces) for faces in images],
        "given_boxes": [[x for face in faces for x in face["box"]] for faces in images],
        "given_points": [[x for face in faces for x in face["landmarks"]] for faces in images],
        "given_scores": [[face["det_score"] for face in faces] for faces in images],
    }
    columns = {name: pa.array(given[name], GIVEN_COLUMNS.field(name).type) for name in GIVEN_COLUMNS.names}
    return pa.table({**{name: work[name] for name in WORK_ITEM.names}, **columns})
