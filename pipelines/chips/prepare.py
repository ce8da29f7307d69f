"""Chip sets made by parallel workers: images in, one folder of aligned faces out, whole or not there at all.

Workers leave parts as `embed` does; this process moves their chips into shards as they come. A run that was killed
goes on behind the last whole shard.
"""

import csv
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.errors import ConfigError, EvaluationError, SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import Record
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.sources import open_source
from facepipe.storage.lease import hold_lease
from facepipe.training.data.chip_set import SET, ChipSet, ChipSetInfo, read_set_info
from facepipe.training.data.chip_writer import ChipFilter, ChipShardWriter, read_face_ids, read_uri_hashes, write_index
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.data.origin import describe_origin
from facepipe.training.data.selection import SELECTION_FILES, select_faces
from facepipe.training.validation import PairSet, ValidateConfig, collect_names, read_validation_pairs
from pipelines.chips.exclude import collect_exclusions
from pipelines.chips.run import HELD, MARKS, PARTS, ChipOrder, ChipRunConfig, run_chip_workers

Progress = Callable[[str], None]
PLAN, FAILURES = "plan.json", "failed.csv"
_USE = ".lock-use"


def prepare_chips(
    data: DataConfig,
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    progress: Progress = lambda line: None,
    settled: bool = False,
) -> ChipSet:
    """The chip set of some data for an embedder, made in `folder` unless it is there already.

    It is made anew when the config, the gallery's version, a list or the embedder's chips have changed; with `settled`
    only when the config or the embedder's chips have, so that a training goes on with what it began with. Files that
    come or go below a source folder are not noticed: delete the set's folder then. Raises ConfigError for a folder
    that holds something else, or a set that another training uses and that is not the one wanted; SourceError where
    there are no images, no labels, or fewer than 2 identities. Images that cannot be used raise nothing: they are
    counted in `info.figures`, with reasons in failed.csv.
    """
    return _prepare_order(ChipOrder(data.check(), embedder), folder, run or ChipRunConfig(), progress, settled)


def prepare_images(
    data: DataConfig,
    wanted: frozenset[str],
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    progress: Progress = lambda line: None,
    settled: bool = False,
) -> ChipSet:
    """The chip set of the subjects of named images, labelled or not, made in `folder`; see `prepare_chips`.

    Names are path ends without extension, as in pairs files. Raises EvaluationError where images are absent; one in
    which no face is found has no chip.
    """
    order = ChipOrder(data.check(), embedder, tuple(sorted(wanted)), labelled=False)
    chips = _prepare_order(order, folder, run or ChipRunConfig(), progress, settled)
    names = ImageNames(wanted)
    absent = sorted(wanted - {names.find_name(uri) for uri in (*chips.uris, *_iterate_chipless_uris(data, chips))})
    if absent:
        raise EvaluationError(
            f"{len(absent)} images are not in {data.source or data.gallery!r}, such as {', '.join(absent[:3])}: are "
            "the pictures of the pairs file there?"
        )
    return chips


def _iterate_chipless_uris(data: DataConfig, chips: ChipSet) -> Iterator[str]:
    """The uris of images that there are, though not as chips."""
    with open(os.path.join(chips.folder, FAILURES), newline="", encoding="utf-8", errors="surrogateescape") as file:
        yield from (row["uri"] for row in csv.DictReader(file))
    if data.gallery:
        for batch in Gallery(data.gallery).batches(["uri"], "face_id is null"):
            yield from batch["uri"].to_pylist()


def prepare_pairs(
    config: ValidateConfig,
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    progress: Progress = lambda line: None,
    trained: Iterable[str] = (),
) -> PairSet:
    """The pairs of a file as chips in `folder`; where config.held_only, those without a person in `trained`."""
    wanted = collect_names(read_validation_pairs(replace(config, held_only=False)))
    chips = prepare_images(config.data, wanted, embedder, folder, run, progress)
    return PairSet.from_names(chips, read_validation_pairs(config, trained), os.path.basename(config.pairs))


def _prepare_order(
    order: ChipOrder, folder: str, run: ChipRunConfig, progress: Progress, settled: bool = False
) -> ChipSet:
    if storage.is_remote(folder):
        raise ConfigError(f"{folder!r} is in an object store; chips are read at random, and need a folder on a disk")
    folder = os.path.abspath(folder)
    fingerprint, info = order.fingerprint, read_set_info(folder)
    if settled and info and info.asked == order.config_fingerprint:
        if info.fingerprint != fingerprint:
            progress(f"going on with the chips in {folder!r}, though the data has changed since; --fresh takes it anew")
        return ChipSet.open(folder)
    if not _is_made_from(folder, fingerprint):
        with hold_lease(folder, "chip set", progress):
            if not _is_made_from(folder, fingerprint):  # another run may have made it while we waited
                _check_source(order.data)  # before chips that are there go
                with _require_unused(folder):
                    _begin_folder(folder, fingerprint)
                    _make_chips(order, folder, run, progress)
    return ChipSet.open(folder)


@contextmanager
def mark_in_use(folder: str) -> Iterator[None]:
    """While inside, the chip set in a folder is not made anew by others; the end of the process lets go as well."""
    with open(os.path.join(folder, _USE), "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _require_unused(folder: str) -> Iterator[None]:
    with open(os.path.join(folder, _USE), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder!r} holds chips of other data, which another training is using: give another run.chips"
            ) from None
        yield


def _is_made_from(folder: str, fingerprint: str) -> bool:
    info = read_set_info(folder)
    return info is not None and info.fingerprint == fingerprint


def _begin_folder(folder: str, fingerprint: str) -> None:
    """Ready the folder: what an interrupted run for the same set left stays, another set goes."""
    plan = os.path.join(folder, PLAN)
    try:
        with open(plan, encoding="utf-8") as file:
            same = file.read() == fingerprint
    except OSError:
        same = False
        if foreign := [name for name in os.listdir(folder) if not name.startswith(".lock")]:
            raise ConfigError(f"{folder!r} holds {foreign[0]!r} and is no chip set: choose a new folder") from None
    if not same or read_set_info(folder) is not None:
        storage.delete(os.path.join(folder, SET))  # first: from here on it is no set
        for name in os.listdir(folder):
            if name != PLAN and not name.startswith(".lock"):
                path = os.path.join(folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        storage.write(plan, fingerprint.encode())
    shutil.rmtree(os.path.join(folder, PARTS), ignore_errors=True)


def _make_chips(order: ChipOrder, folder: str, run: ChipRunConfig, progress: Progress) -> None:
    data, origin = order.data, describe_origin(order.data)
    left_out = collect_exclusions(data, progress)
    figures = Counter[str]()
    if data.gallery:
        gallery = Gallery(data.gallery)
        figures.update(
            select_faces(data, gallery, left_out, folder, frozenset(order.wanted) if not order.labelled else None)
        )
    writer = ChipShardWriter(folder)  # also takes away what an interrupted run had not finished
    figures["held from an interrupted run"] = _write_known(order, folder)
    os.makedirs(os.path.join(folder, PARTS), exist_ok=True)
    mover = _ChipMover(folder, writer, figures)
    for record in run_chip_workers(order, folder, run):
        mover(record)
        progress(f"{figures['images']} images, {mover.chips} chips")
    mover.close()
    keep = ChipFilter(data.min_images, data.max_images, left_out.images, left_out.names, order.labelled)
    layout = find_chip_layout(order.embedder)
    counted = {n: c for n, c in figures.items() if c}
    info = ChipSetInfo(order.fingerprint, order.embedder, layout.size, 0, 0, counted, order.config_fingerprint, origin)
    write_index(folder, info, keep)
    for name in (PARTS, MARKS):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    for name in (HELD, *SELECTION_FILES):
        storage.delete(os.path.join(folder, name))


def _check_source(data: DataConfig) -> None:
    if data.gallery:
        return
    source = open_source(data.source_config)
    if next(iter(source), None) is None:
        raise SourceError(f"no image in {data.source!r} ({source.ignored} other files were passed over)")


def _write_known(order: ChipOrder, folder: str) -> int:
    """Write what whole shards hold already, for the listing; how much that is."""
    held: Any = read_face_ids(folder) if order.data.gallery else read_uri_hashes(folder)
    np.save(os.path.join(folder, HELD), held)
    return len(held)


class _ChipMover:
    """Takes the chips of finished parts into the shards, and counts."""

    def __init__(self, folder: str, writer: ChipShardWriter, figures: Counter[str]):
        self._folder, self._writer, self._figures = folder, writer, figures
        self.chips = 0
        self._failures = os.path.join(folder, FAILURES)
        storage.write(self._failures, b"uri,status,error\n")

    def __call__(self, record: Record) -> None:
        self._figures["images"] += record.images
        self._figures["listed twice"] += record.repeated
        self._figures["no image files"] += record.ignored
        for status, count in record.statuses.items():
            if status != "ok":
                self._figures[f"failed: {status}"] += count
        if record.path is None:
            return
        path = os.path.join(self._folder, PARTS, record.path)
        rows = pq.read_table(path, columns=["face_id", "image_id", "uri", "identity", "thumb", "status", "error"])
        has_chip = pc.is_valid(rows["thumb"])
        chips = rows.filter(has_chip).select(["face_id", "image_id", "uri", "identity", "thumb"])
        self._writer.add(chips.rename_columns(["face_id", "image_id", "uri", "identity", "chip"]))
        self.chips += chips.num_rows
        self._record_failures(rows.filter(pc.invert(has_chip)))
        os.unlink(path)

    def _record_failures(self, failed: pa.Table) -> None:
        with open(self._failures, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            for row in failed.select(["uri", "status", "error"]).to_pylist():
                rows.writerow((row["uri"], row["status"], row["error"] or ""))

    def close(self) -> None:
        self._writer.close()
