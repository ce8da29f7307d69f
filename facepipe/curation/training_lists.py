"""The lists that end a cleaning: every image of a gallery is to train on, rejected with a reason, or to review.

What `clean` and `dedup` decided is streamed. What has to be known of all images at once lies in hash tables on disk, so
that memory does not grow with the gallery.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.curation.cleaning.lists import FAILED, NO_FACE_FOUND, UNLABELLED
from facepipe.hashing import hash64_column
from facepipe.sources.labels import normalise_name, sort_labels
from facepipe.storage.hashtable import HashTable
from facepipe.text import protect_cell
from facepipe.types import Bool

TRAIN = "train.csv"
REJECTED = "rejected.csv"
REVIEW = "review.csv"
COLUMNS = {
    TRAIN: ("path", "identity", "label", "face_id"),
    REJECTED: ("path", "reason"),
    REVIEW: ("path", "identity", "suggested", "probability", "reason", "face_id"),
}
"""The lists, and their columns."""

_ROWS = 65536
_IMAGE_COLUMNS = ("uri", "identity", "decision", "reason", "suggested", "noise", "face_id", "faces")
# What becomes of an image before copies are looked at.
_TO_TRAIN = 0
_TO_REVIEW = 1
_TO_REJECT = 2
# Decisions of `clean` on images that are rejected, by the reason that the list gives before the one of `clean`.
_REJECTED = {
    FAILED: "cannot be read",
    NO_FACE_FOUND: "no face",
    UNLABELLED: "no label",
    "outlier": "wrong label",
    "duplicate": "copy",
    "low_quality": "low quality",
}


@dataclass(frozen=True)
class TestOverlap:
    """What the images share with a gallery that tests the network.

    Attributes:
        name: what the user calls that gallery.
        uris: images that it holds as well, (n,) strings.
        identities: normalised names of persons in it.
    """

    __test__ = False  # not a test, whatever its name begins with

    name: str
    uris: pa.Array
    identities: frozenset[str]


@dataclass
class TrainingLists:
    """Figures of the written lists.

    Attributes:
        images: images of the gallery, each of which is in exactly one list.
        train: rows of train.csv.
        relabelled: those among them that have another identity than the source gave.
        identities: persons in train.csv.
        rejected: rows of rejected.csv, by the first words of their reason.
        review: rows of review.csv.
        other_faces: faces in photos beside the one that bears the label. They are no wrong labels.
    """

    images: int = 0
    train: int = 0
    relabelled: int = 0
    identities: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    review: int = 0
    other_faces: int = 0

    def count_rejected(self, kind: str) -> None:
        """Count a rejected image."""
        self.rejected[kind] = self.rejected.get(kind, 0) + 1


def write_training_lists(
    images: str,
    copies: str,
    folder: str,
    tests: Sequence[TestOverlap] = (),
    *,
    relabels: bool = False,
    unverified: bool = True,
) -> TrainingLists:
    """Write train.csv, rejected.csv and review.csv into a folder; every image is in exactly one of them.

    An image that a test gallery holds, or whose person is in it, is rejected even if its label is doubtful. Of copies
    of a picture the first one that can be trained on stays.

    Args:
        images: path of images.parquet, as `clean` writes it.
        copies: path of decisions.parquet, as `dedup` writes it.
        folder: local folder of the lists.
        tests: what test galleries share with the images.
        relabels: whether images with another label than they should have are trained on under that one. Else they are
            to be reviewed.
        unverified: whether the only image of a person is trained on. Else it is to be reviewed.

    Raises:
        OSError: a list cannot be written.
    """
    lists = TrainingLists()
    with ExitStack() as stack:
        judge = _ImageJudge(stack, tests, relabels=relabels, unverified=unverified)
        usable = stack.enter_context(closing(HashTable()))
        dropped = stack.enter_context(closing(HashTable()))
        writers = {name: stack.enter_context(_ListWriter(folder, name)) for name in COLUMNS}
        # First find the images that can be trained on, then the copies among them, whose reasons `dedup` knows.
        for rows in _read_rows(images, _IMAGE_COLUMNS):
            usable.add(hash64_column(rows["uri"].filter(pa.array(judge.judge(rows).fate == _TO_TRAIN))))
        for copy in _find_copies(copies, usable, dropped, stack):
            writers[REJECTED].write(copy.uri, f"copy: {copy.reason}")
            lists.count_rejected("copy")
        # Number the persons by their labels, so that the order of the table does not matter.
        names: set[str] = set()
        for rows in _read_rows(images, _IMAGE_COLUMNS):
            judgement = judge.judge(rows)
            is_trained = (judgement.fate == _TO_TRAIN) & ~dropped.get(hash64_column(rows["uri"]))[0]
            names.update(judgement.name.filter(pa.array(is_trained)).to_pylist())
        numbers = {name: number for number, name in enumerate(sort_labels(names))}
        # Then every image goes to its list, but for the copies, which are there already.
        for rows in _read_rows(images, _IMAGE_COLUMNS):
            _write_rows(rows, judge.judge(rows), dropped.get(hash64_column(rows["uri"]))[0], writers, numbers, lists)
        lists.identities = len(numbers)
    return lists


@dataclass(frozen=True)
class _Judgement:
    """What becomes of some images.

    Attributes:
        fate: _TO_TRAIN, _TO_REVIEW or _TO_REJECT per image, (n,).
        test: number of the test gallery that an image is in, counted from 1; 0 for none, (n,).
        test_person: the same for its person, (n,).
        name: name under which an image is trained on.
    """

    fate: np.ndarray[Any, np.dtype[np.int8]]
    test: np.ndarray[Any, np.dtype[np.uint64]]
    test_person: np.ndarray[Any, np.dtype[np.uint64]]
    name: pa.Array
    tests: Sequence[TestOverlap]

    def name_test(self, row: int) -> str:
        """Return why the test galleries reject an image, or ""."""
        if self.test[row]:
            return f"in the test gallery {self.tests[int(self.test[row]) - 1].name}"
        if self.test_person[row]:
            return f"its person is in the test gallery {self.tests[int(self.test_person[row]) - 1].name}"
        return ""


class _ImageJudge:
    """Decides what becomes of images, apart from copies."""

    def __init__(self, stack: ExitStack, tests: Sequence[TestOverlap], *, relabels: bool, unverified: bool):
        self._tests = tests
        self._relabels = relabels
        self._in_test = stack.enter_context(closing(HashTable(width=1)))
        # The first test gallery that holds an image names the reason, so it is added last.
        for number in range(len(tests), 0, -1):
            keys = hash64_column(tests[number - 1].uris)
            self._in_test.add(keys, np.full((len(keys), 1), number, np.uint64))
        trained = ["keep"]
        if unverified:
            trained.append("unverified")
        if relabels:
            trained.append("relabel")
        self._trained = pa.array(trained, pa.string())
        self._rejected = pa.array(list(_REJECTED), pa.string())

    def judge(self, rows: pa.Table) -> _Judgement:
        """Judge rows of images.parquet."""
        decision = rows["decision"].combine_chunks()
        fate = np.full(len(rows), _TO_REVIEW, np.int8)
        fate[_to_mask(pc.is_in(decision, self._trained))] = _TO_TRAIN
        fate[_to_mask(pc.is_in(decision, self._rejected))] = _TO_REJECT
        # What tests the network must not be trained on, whoever reviews it.
        test = self._in_test.get(hash64_column(rows["uri"]))[1][:, 0]
        is_moved = pc.equal(decision, "relabel")
        name = pc.if_else(is_moved, rows["suggested"].combine_chunks(), rows["identity"].combine_chunks())
        test_person = self._find_persons(name)
        # A person who reviews a label may leave it as it is.
        if not self._relabels:
            test_person = np.maximum(test_person, self._find_persons(rows["identity"].combine_chunks()))
        fate[(fate != _TO_REJECT) & ((test > 0) | (test_person > 0))] = _TO_REJECT
        return _Judgement(fate, test, test_person, name, self._tests)

    def _find_persons(self, names: pa.Array) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Find the test gallery that each person is in, counted from 1; 0 for none, (n,)."""
        result = np.zeros(len(names), np.uint64)
        if not self._tests:
            return result
        # A batch has few names, so each is looked up once.
        encoded = names.dictionary_encode()
        numbers = np.zeros(len(encoded.dictionary) + 1, np.uint64)
        for place, text in enumerate(encoded.dictionary.to_pylist()):
            normal = normalise_name(text)
            matches = (n for n, test in enumerate(self._tests, start=1) if normal in test.identities)
            numbers[place] = next(matches, 0)
        return numbers[pc.fill_null(encoded.indices, len(encoded.dictionary)).to_numpy()]


@dataclass(frozen=True)
class _Copy:
    """An image that is rejected as a copy, and why."""

    uri: str
    reason: str


def _find_copies(path: str, usable: HashTable, dropped: HashTable, stack: ExitStack) -> Iterator[_Copy]:
    """Find the images that can be trained on and are copies of others that can.

    `dedup` may keep a copy that `clean` rejects. Then the first of the others takes its place.

    Args:
        path: path of decisions.parquet of `dedup`.
        usable: hashes of the images that can be trained on.
        dropped: gets the hashes of the copies.
        stack: closes what is opened here.
    """
    replaced = stack.enter_context(closing(HashTable()))
    columns = ("uri", "side", "decision", "kept_uri", "reason")
    for rows in _read_rows(path, columns):
        is_copy = pc.and_(pc.equal(rows["decision"], "drop"), pc.equal(rows["side"], 0))
        rows = rows.filter(is_copy)
        keys = hash64_column(rows["uri"])
        rows = rows.filter(pa.array(usable.get(keys)[0]))
        keys = hash64_column(rows["uri"])
        kept = hash64_column(rows["kept_uri"])
        # `add` tells which of the copies is the first whose better copy cannot be trained on.
        stays = ~usable.get(kept)[0]
        stays[stays] = replaced.add(kept[stays])
        dropped.add(keys[~stays])
        for row in rows.filter(pa.array(~stays)).select(["uri", "reason"]).to_pylist():
            yield _Copy(row["uri"], row["reason"])


def _write_rows(
    rows: pa.Table,
    judgement: _Judgement,
    is_dropped: Bool,
    writers: dict[str, "_ListWriter"],
    numbers: dict[str, int],
    lists: TrainingLists,
) -> None:
    """Write rows of images.parquet to their lists, and count them.

    Args:
        rows: the rows.
        judgement: what becomes of them.
        is_dropped: which of them are in the list of rejected images already, as copies.
        writers: the lists.
        numbers: number of each person who is trained on.
        lists: the counts.
    """
    names = judgement.name.to_pylist()
    for place, row in enumerate(rows.to_pylist()):
        lists.images += 1
        if row["identity"] is not None:
            lists.other_faces += max(0, (row["faces"] or 0) - 1)
        fate = judgement.fate[place]
        if is_dropped[place]:
            continue
        if fate == _TO_TRAIN:
            name = names[place]
            writers[TRAIN].write(row["uri"], name, numbers[name], row["face_id"])
            lists.train += 1
            lists.relabelled += row["decision"] == "relabel"
        elif fate == _TO_REVIEW:
            noise = "" if row["noise"] is None else f"{row['noise']:.4f}"
            suggested = row["suggested"] or ""
            writers[REVIEW].write(row["uri"], row["identity"] or "", suggested, noise, row["reason"], row["face_id"])
            lists.review += 1
        else:
            in_test = judgement.name_test(place)
            kind = "test gallery" if in_test else _REJECTED[row["decision"]]
            reason = row["reason"] if kind in row["reason"] else f"{kind}: {row['reason']}"
            writers[REJECTED].write(row["uri"], in_test or reason)
            lists.count_rejected(kind)


class _ListWriter:
    """One of the lists, as it is written."""

    def __init__(self, folder: str, name: str):
        self._file = open(  # noqa: SIM115
            os.path.join(folder, name), "w", newline="", encoding="utf-8", errors="surrogateescape"
        )
        self._writer = csv.writer(self._file)
        self._writer.writerow(COLUMNS[name])

    def write(self, *cells: object) -> None:
        """Write a row; a text that a spreadsheet would take for a formula has a `'` before it."""
        self._writer.writerow(protect_cell(cell) if isinstance(cell, str) else cell for cell in cells)

    def __enter__(self) -> "_ListWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _read_rows(path: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=list(columns)):
            yield pa.Table.from_batches([batch]).select(list(columns))


def _to_mask(values: pa.Array) -> Bool:
    mask: Bool = pc.fill_null(values, False).to_numpy(zero_copy_only=False)
    return mask
