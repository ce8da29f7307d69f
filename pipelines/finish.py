"""finish: judge labels, find copies and what test galleries hold, and write the lists that end a cleaning.

The images to train on can be written as a dataset as well.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from facepipe import storage
from facepipe.curation.cleaning.judge import CleanRules
from facepipe.curation.cleaning.lists import DECISIONS_FILE, IMAGES_FILE
from facepipe.curation.duplicates import DuplicateRule
from facepipe.curation.training_lists import (
    COLUMNS,
    REJECTED,
    REVIEW,
    TRAIN,
    TestOverlap,
    TrainingLists,
    write_training_lists,
)
from facepipe.datasets.write import DatasetFormat, DatasetSummary, require_new_folder, write_dataset
from facepipe.decisions.mark import has_new_decisions
from facepipe.errors import AccountingError, ConfigError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark, find_changes
from facepipe.sources import SourceConfig, open_source
from facepipe.storage.atomic import publish_file
from facepipe.storage.owned import require_own_list
from facepipe.storage.store import open_store
from facepipe.training.data.config import DataConfig
from pipelines import clean, dedup
from pipelines.chips.exclude import collect_exclusions
from pipelines.dedup.pipeline import NAME as DEDUP
from pipelines.graph import GraphConfig, GraphRunConfig, OnProgress
from pipelines.runtime.run_record import PhaseTimer, record_calls
from pipelines.runtime.workspace import REPORTS, locate_reports

SUMMARY = "summary.json"
DATASET = "dataset"


@dataclass(frozen=True)
class FinishConfig:
    """Configure `finish`. A report of `clean` or `dedup` that is up to date is taken as it is.

    Attributes:
        clean: Which faces are unfit for training, and what the lists hold.
        dedup: What counts as a copy, and which one is kept.
        graph: Which faces are joined.
        run: How the graph is made.
    """

    clean: CleanRules = field(default_factory=CleanRules)
    dedup: DuplicateRule = field(default_factory=DuplicateRule)
    graph: GraphConfig = field(default_factory=GraphConfig)
    run: GraphRunConfig = field(default_factory=GraphRunConfig)


@dataclass
class FinishSummary(TrainingLists):
    """The figures of the lists, and where they are.

    Attributes:
        gallery: folder of the gallery.
        version: version of its table.
        tests: galleries that test the network.
        out: folder of the lists.
        dataset: what was written of the images to train on; None if no dataset was asked for.
        seconds: seconds per phase.
    """

    gallery: str = ""
    version: int = -1
    tests: tuple[str, ...] = ()
    out: str = ""
    dataset: DatasetSummary | None = None
    seconds: dict[str, float] = field(default_factory=dict)


@record_calls("finish")
def run(
    config: FinishConfig,
    gallery: str,
    out: str,
    tests: Sequence[str] = (),
    progress: OnProgress = lambda line: None,
    dataset: DatasetFormat | None = None,
) -> FinishSummary:
    """Write the lists that end the cleaning of a dataset; every image of the gallery is in exactly one of them.

    Args:
        config: the configuration.
        gallery: path of the gallery.
        out: folder or URL of the lists. Lists that an earlier run wrote there are replaced.
        tests: galleries that test the network. What they share with the gallery is rejected.
        progress: called with each line of progress.
        dataset: format in which the images of the train list are written as well, into the folder `dataset` of `out`.

    Raises:
        ConfigError: if the folder holds a file of that name and of somebody else, or a test gallery is the gallery.
        GalleryError: if the gallery has no label.
        AccountingError: if an image is in no list, or the gallery changed meanwhile.
        StorageError: if there is a dataset already, or it cannot be written.
    """
    for test in tests:
        if storage.to_absolute(test).rstrip("/") == storage.to_absolute(gallery).rstrip("/"):
            raise ConfigError(f"the test gallery {test!r} is the gallery itself: give the one that tests the network")
    if dataset:
        require_new_folder(storage.join(out, DATASET))
    for name, columns in COLUMNS.items():
        require_own_list(storage.join(out, name), columns)
    summary = FinishSummary(gallery=gallery, tests=tuple(tests), out=out)
    phases = PhaseTimer(summary.seconds)
    _update_reports(config, gallery, progress)
    phases.end("reports")
    overlaps = [_find_overlap(gallery, test, progress) for test in tests]
    phases.end("tests")
    progress("writing the lists")
    table = Gallery(gallery)
    table.freeze()
    with _open_output(out) as folder:
        lists = write_training_lists(
            os.path.join(_fetch_report(table, clean.NAME), IMAGES_FILE),
            os.path.join(_fetch_report(table, DEDUP), "decisions.parquet"),
            folder,
            overlaps,
            relabels=config.clean.relabels,
            unverified=config.clean.unverified,
        )
        # Every image of the gallery is in one list, or none is written.
        held = table.counts()["images"]
        listed = lists.train + lists.review + sum(lists.rejected.values())
        if not held == lists.images == listed:
            raise AccountingError(
                f"the gallery has {held} images, and the lists {listed}: it changed meanwhile; run the command again"
            )
        for name, value in asdict(lists).items():
            setattr(summary, name, value)
        summary.version = table.version
        phases.end("lists")
        with open(os.path.join(folder, SUMMARY), "w", encoding="utf-8") as file:
            json.dump(asdict(summary), file, indent=2)
    if dataset:
        progress("writing the dataset")
        train = open_source(SourceConfig(storage.join(out, TRAIN)))
        summary.dataset = write_dataset(train, storage.join(out, DATASET), dataset, gallery)
        phases.end("dataset")
    return summary


def _update_reports(config: FinishConfig, gallery: str, progress: OnProgress) -> None:
    """Make the reports of `clean` and `dedup`, unless they are up to date."""
    if _is_outdated(gallery, clean.NAME, IMAGES_FILE):
        progress("clean")
        clean_config = clean.CleanConfig(config.clean, config.dedup, config.graph, config.run)
        clean.run(clean_config, gallery, progress)
    if _is_outdated(gallery, DEDUP, DECISIONS_FILE):
        progress("dedup")
        dedup.run(dedup.DedupConfig(config.dedup, config.graph, config.run), gallery, None, progress)


def _is_outdated(gallery: str, name: str, file: str) -> bool:
    """Tell whether a report has no such file, or the gallery or a decision has changed since it was made."""
    table = Gallery(gallery)
    folder = _fetch_report(table, name)
    mark = ReadMark.load(os.path.join(folder, clean.MARK))
    if mark is None or mark.gallery != table.id or not os.path.exists(os.path.join(folder, file)):
        return True
    if has_new_decisions(folder, table.path):
        return True
    return mark.version != table.version and not find_changes(table, mark).is_empty


def _fetch_report(table: Gallery, name: str) -> str:
    """Return the folder of a report on this machine; that of a gallery in an object store is fetched."""
    open_store(table.path, f"{REPORTS}/{name}").pull()
    return os.path.join(locate_reports(table), name)


def _find_overlap(gallery: str, test: str, progress: OnProgress) -> TestOverlap:
    """Find what a gallery shares with one that tests the network, as training does."""
    exclusions = collect_exclusions(DataConfig(gallery=gallery, exclude=(test,)), progress)
    return TestOverlap(test, exclusions.uris, exclusions.names)


@contextmanager
def _open_output(out: str) -> Iterator[str]:
    """Yield a local folder to write lists into; they get to their place when all are complete."""
    remote = storage.is_remote(out)
    if not remote:
        storage.make_folder(out)
    with tempfile.TemporaryDirectory(prefix="facepipe-", dir=None if remote else out) as folder:
        try:
            yield folder
            for name in (REJECTED, REVIEW, TRAIN, SUMMARY):
                path = os.path.join(folder, name)
                if remote:
                    storage.write_file(storage.join(out, name), path)
                else:
                    publish_file(path, os.path.join(out, name), sync=True)
        except OSError as error:
            raise StorageError(f"cannot write the lists to {out!r}: {storage.describe_error(error)}") from error
