"""Make chip sets with parallel workers: images in, one folder of aligned faces out, complete or absent.

Workers leave parts as `embed` does. This process moves their chips into shards as they arrive. A run that was killed
resumes after the last complete shard.
"""

import csv
import fcntl
import os
import re
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
from facepipe.decisions.gallery import DecidedGallery
from facepipe.erasure.trainings import record_training
from facepipe.errors import ConfigError, EvaluationError, SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import PartRecord, is_part
from facepipe.models.zoo.registry import find_chip_layout
from facepipe.schema import OK
from facepipe.sources import open_source
from facepipe.storage.atomic import open_for_writing
from facepipe.storage.lease import hold_lease
from facepipe.storage.owned import delete_owned
from facepipe.text import protect_cell, restore_cell
from facepipe.training.data.chip_set import (
    IDENTITIES,
    INDEX,
    SET,
    SHARD_NAME,
    ChipSet,
    ChipSetInfo,
    read_set_info,
)
from facepipe.training.data.chip_writer import (
    UNFINISHED_SHARD,
    ChipFilter,
    ChipShardWriter,
    read_face_ids,
    read_uri_hashes,
    write_index,
)
from facepipe.training.data.config import DataConfig
from facepipe.training.data.image_names import ImageNames
from facepipe.training.data.origin import describe_origin
from facepipe.training.data.selection import SELECTION_FILES, select_faces
from facepipe.training.validation import PairSet, ValidateConfig, collect_names, read_validation_pairs
from pipelines.chips.exclude import collect_exclusions
from pipelines.chips.run import HELD, MARKS, PARTS, ChipOrder, ChipRunConfig, run_chip_workers
from pipelines.runtime import crash_marks

PLAN = "plan.json"
FAILURES = "failed.csv"
# Locked as shared by each training that reads the chips, and exclusively by a run that replaces them.
_USE_LOCK = ".lock-use"
_LOCK_PREFIX = ".lock"
# A plan is the hash of what the set is made of.
_FINGERPRINT = re.compile(r"[0-9a-f]{16,64}")
_MAX_PLAN = 64
# Files in the folder of a chip set, and unfinished ones.
_OWN_FILE = re.compile(
    rf"{SHARD_NAME}(?:{re.escape(UNFINISHED_SHARD)})?|"
    rf"(?:{'|'.join(map(re.escape, (SET, INDEX, IDENTITIES, PLAN, FAILURES, HELD, *SELECTION_FILES)))})(?:\.new)?"
)
_PART_COLUMNS = ["face_id", "image_id", "uri", "identity", "thumb", "status", "error"]
_CHIP_COLUMNS = ["face_id", "image_id", "uri", "identity", "thumb"]


def prepare_chips(
    data: DataConfig,
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    log: Callable[[str], None] = lambda line: None,
    *,
    keep_outdated: bool = False,
) -> ChipSet:
    """Open the chip set of some data for an embedder, and make it first unless it exists.

    It is made again if the config, the gallery's version, a list or the embedder's chips have changed. Files that are
    added to or removed from a source folder are not noticed: delete the set's folder then. Images that cannot be used
    raise nothing. They are counted in `info.figures`, and `failed.csv` lists them with reasons.

    Args:
        data: what to train on.
        embedder: name of a model or TOML file, which decides the layout of chips.
        folder: folder of the chip set.
        run: how to run the workers.
        log: called with lines about the progress.
        keep_outdated: make the set again only if the config or the embedder's chips have changed, so that a training
            that resumes keeps its chips.

    Raises:
        ConfigError: The folder holds something else, or another training uses the outdated set in it.
        SourceError: There are no images, no labels, or fewer than 2 identities.
    """
    order = ChipOrder(data.check(), embedder)
    return _prepare_order(order, folder, run or ChipRunConfig(), log, keep_outdated=keep_outdated)


def prepare_images(
    data: DataConfig,
    image_names: frozenset[str],
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    log: Callable[[str], None] = lambda line: None,
    *,
    keep_outdated: bool = False,
) -> ChipSet:
    """Open the chip set of the subjects of named images, labelled or not; see `prepare_chips`.

    An image in which no face is found has no chip.

    Args:
        data: where the images are.
        image_names: ends of paths without extension, as in pairs files.
        embedder: name of a model or TOML file, which decides the layout of chips.
        folder: folder of the chip set.
        run: how to run the workers.
        log: called with lines about the progress.
        keep_outdated: make the set again only if the config or the embedder's chips have changed.

    Raises:
        EvaluationError: The data does not hold all of the images.
    """
    order = ChipOrder(data.check(), embedder, tuple(sorted(image_names)), needs_identity=False)
    chips = _prepare_order(order, folder, run or ChipRunConfig(), log, keep_outdated=keep_outdated)
    names = ImageNames(image_names)
    # An image is present if it has a chip, or if it is known to have none.
    known = {names.find_name(uri) for uri in chips.uris}
    known |= {names.find_name(uri) for uri in _iterate_chipless_uris(data, chips)}
    absent = sorted(image_names - known)
    if absent:
        raise EvaluationError(
            f"{len(absent)} images are not in {data.source or data.gallery!r}, such as {', '.join(absent[:3])}: check "
            "that the images of the pairs file are there"
        )
    return chips


def _iterate_chipless_uris(data: DataConfig, chips: ChipSet) -> Iterator[str]:
    """Yield the uris of images that exist but have no chip."""
    with open(os.path.join(chips.folder, FAILURES), newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            yield restore_cell(row["uri"])
    if data.gallery:
        for batch in Gallery(data.gallery).batches(["uri"], "face_id is null"):
            yield from batch["uri"].to_pylist()


def prepare_pairs(
    config: ValidateConfig,
    embedder: str,
    folder: str,
    run: ChipRunConfig | None = None,
    log: Callable[[str], None] = lambda line: None,
    trained: Iterable[str] = (),
) -> PairSet:
    """Open the pairs of a file as chips, and make the chips first unless they exist.

    Args:
        config: the pairs and their images.
        embedder: name of a model or TOML file, which decides the layout of chips.
        folder: folder of the chip set.
        run: how to run the workers.
        log: called with lines about the progress.
        trained: names of persons that are trained on; `config.held_only` leaves out their pairs.
    """
    # Make the chips of all pairs, whoever is trained on: the set then serves other trainings as well.
    image_names = collect_names(read_validation_pairs(replace(config, held_only=False)))
    chips = prepare_images(config.data, image_names, embedder, folder, run, log)
    return PairSet.from_names(chips, read_validation_pairs(config, trained), os.path.basename(config.pairs))


def _prepare_order(
    order: ChipOrder, folder: str, run: ChipRunConfig, log: Callable[[str], None], *, keep_outdated: bool
) -> ChipSet:
    """Open the chip set of an order, and make it first unless it exists."""
    if storage.is_remote(folder):
        raise ConfigError(f"{folder!r} is in an object store: set a local folder, because chips are read at random")
    folder = os.path.abspath(folder)
    if order.data.gallery:
        record_training(order.data.gallery, folder)
    fingerprint = order.fingerprint
    info = read_set_info(folder)
    # A training that resumes keeps its chips, even if the data has changed since.
    if keep_outdated and info and order.has_config(info.asked):
        if info.fingerprint != fingerprint:
            log(f"the data has changed, but training resumes with the chips in {folder!r}; --fresh makes new ones")
        return ChipSet.open(folder)
    if not _is_made_from(folder, fingerprint):
        with hold_lease(folder, "chip set", log):
            # Another run may have made it while this one waited.
            if not _is_made_from(folder, fingerprint):
                _check_source(order.data)  # before existing chips are deleted
                with _require_unused(folder):
                    _begin_folder(folder, fingerprint)
                    _make_chips(order, folder, run, log)
    return ChipSet.open(folder)


@contextmanager
def mark_in_use(folder: str) -> Iterator[None]:
    """Keep others from replacing the chip set in a folder. The end of the process releases it too."""
    with open(open_for_writing(os.path.join(folder, _USE_LOCK)), "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextmanager
def _require_unused(folder: str) -> Iterator[None]:
    """Raise ConfigError if another training uses the chip set; keep it unused inside."""
    with open(open_for_writing(os.path.join(folder, _USE_LOCK)), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{folder!r} holds chips of other data, which another training is using: set another run.chips"
            ) from None
        yield


def _is_made_from(folder: str, fingerprint: str) -> bool:
    info = read_set_info(folder)
    return info is not None and info.fingerprint == fingerprint


def _begin_folder(folder: str, fingerprint: str) -> None:
    """Prepare the folder: keep the shards of an interrupted run for the same set, and delete another set.

    Raises:
        ConfigError: The folder holds other files and is not a chip set.
    """
    # The plan names the set that the folder's shards are for. A folder without a plan must hold nothing but locks.
    plan = os.path.join(folder, PLAN)
    current = _read_plan(plan)
    foreign = [name for name in sorted(os.listdir(folder)) if not name.startswith(_LOCK_PREFIX)]
    if current is None and foreign:
        raise ConfigError(f"{folder!r} holds {foreign[0]!r} and is not a chip set: choose an empty or new folder")
    if current != fingerprint or read_set_info(folder) is not None:
        # Delete set.json first: without it the folder is not a chip set. Files of somebody else stay.
        storage.delete(os.path.join(folder, SET))
        delete_owned(folder, lambda name: owns_chip_file(name) and name != PLAN)
        # Write the plan last: an interruption before leaves the old plan, and the deletion is repeated.
        storage.write(plan, fingerprint.encode())
    # Parts of an interrupted run are not in its shards yet: their images are cut again.
    _delete_temporary(folder, PARTS)


def _read_plan(path: str) -> str | None:
    """Read which set a folder is for; None if there is no plan, or a file of somebody else has its name."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_PLAN + 1)
    except (OSError, UnicodeDecodeError):
        return None
    return text if _FINGERPRINT.fullmatch(text) else None


def owns_chip_file(name: str) -> bool:
    """Tell whether a file in the folder of a chip set is of the set, by its name there."""
    folder, slash, inner = name.partition("/")
    if slash:
        is_own = {PARTS: is_part, MARKS: crash_marks.is_mark}.get(folder)
        return is_own is not None and (not inner or is_own(inner))
    return bool(_OWN_FILE.fullmatch(name))


def _delete_temporary(folder: str, name: str) -> None:
    """Delete the files that are ours in a folder in which only the making of a set works."""
    delete_owned(folder, lambda inner: inner.split("/")[0] == name and owns_chip_file(inner))


def _make_chips(order: ChipOrder, folder: str, run: ChipRunConfig, log: Callable[[str], None]) -> None:
    """Make a chip set in a prepared folder."""
    data = order.data
    origin = describe_origin(data)
    # Choose the faces.
    exclusions = collect_exclusions(data, log)
    figures = Counter[str]()
    if data.gallery:
        image_names = None if order.needs_identity else frozenset(order.image_names)
        figures.update(select_faces(data, DecidedGallery(data.gallery), exclusions, folder, image_names))
    # Cut their chips, and move them into shards. The writer deletes the unfinished shard of an interrupted run.
    writer = ChipShardWriter(folder)
    figures["held from an interrupted run"] = _write_known(order, folder)
    os.makedirs(os.path.join(folder, PARTS), exist_ok=True)
    mover = _ChipMover(folder, writer, figures)
    for record in run_chip_workers(order, folder, run):
        mover.move(record)
        log(f"{figures['images']} images, {mover.chips} chips")
    mover.close()
    # Index the chips that belong to the set. This makes the folder a chip set.
    chip_filter = ChipFilter(
        min_images=data.min_images,
        max_images=data.max_images,
        excluded_images=exclusions.images,
        excluded_names=exclusions.names,
        needs_identity=order.needs_identity,
    )
    info = ChipSetInfo(
        fingerprint=order.fingerprint,
        embedder=order.embedder,
        size=find_chip_layout(order.embedder).size,
        chips=0,
        identities=0,
        figures={name: count for name, count in figures.items() if count},
        asked=order.config_fingerprint,
        origin=origin,
    )
    write_index(folder, info, chip_filter)
    # Delete what only the making needed.
    for name in (PARTS, MARKS):
        _delete_temporary(folder, name)
    for name in (HELD, *SELECTION_FILES):
        storage.delete(os.path.join(folder, name))


def _check_source(data: DataConfig) -> None:
    """Raise SourceError if the source has no images."""
    if data.gallery:
        return
    source = open_source(data.source_config)
    if not source.has_items():
        raise SourceError(f"no image in {data.source!r} ({source.ignored} other files were skipped)")


def _write_known(order: ChipOrder, folder: str) -> int:
    """Write for the listing what complete shards hold already, and return how much that is."""
    known: Any = read_face_ids(folder) if order.data.gallery else read_uri_hashes(folder)
    np.save(os.path.join(folder, HELD), known)
    return len(known)


class _ChipMover:
    """Moves the chips of finished parts into shards, and counts what became of the images."""

    def __init__(self, folder: str, writer: ChipShardWriter, figures: Counter[str]):
        self._folder = folder
        self._writer = writer
        self._figures = figures
        self._failures = os.path.join(folder, FAILURES)
        self.chips = 0
        storage.write(self._failures, b"uri,status,error\n")

    def move(self, record: PartRecord) -> None:
        """Count a finished block, move its chips, and delete its part."""
        self._figures["images"] += record.images
        self._figures["listed twice"] += record.repeated
        self._figures["no image files"] += record.ignored
        for status, count in record.statuses.items():
            if status != OK:
                self._figures[f"failed: {status}"] += count
        if record.path is None:
            return
        # Rows with a chip go into the shard; the others are listed as failures with their reason.
        path = os.path.join(self._folder, PARTS, record.path)
        rows = pq.read_table(path, columns=_PART_COLUMNS)
        has_chip = pc.is_valid(rows["thumb"])
        chips = rows.filter(has_chip).select(_CHIP_COLUMNS)
        self._writer.add(chips.rename_columns([*_CHIP_COLUMNS[:-1], "chip"]))
        self.chips += chips.num_rows
        self._record_failures(rows.filter(pc.invert(has_chip)))
        os.unlink(path)

    def _record_failures(self, failed: pa.Table) -> None:
        with open(self._failures, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            for row in failed.select(["uri", "status", "error"]).to_pylist():
                writer.writerow((protect_cell(row["uri"]), row["status"], protect_cell(row["error"] or "")))

    def close(self) -> None:
        """Finish the last shard."""
        self._writer.close()
