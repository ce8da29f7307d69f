"""nightly: everything a gallery needs every night, in order; each step goes on from where the night before left it."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from facepipe import storage
from facepipe.curation.clusters import tables
from facepipe.erasure.selection import Selection
from facepipe.errors import (
    ConfigError,
    EvaluationError,
    GalleryBusyError,
    GalleryError,
    SourceError,
    StorageError,
)
from facepipe.gallery import Gallery
from facepipe.gallery.lock import writer_lock
from facepipe.gallery.table import RUNS
from facepipe.sources import open_source
from pipelines import cluster, compact, embed, erase, index
from pipelines.cluster import assign as cluster_assign
from pipelines.dedup import DedupConfig
from pipelines.dedup import incremental as dedup_new
from pipelines.embed import EmbedConfig
from pipelines.embed.config import MissingConfig
from pipelines.embed.summary import Summary
from pipelines.index import IndexConfig
from pipelines.nightly.config import NightlyConfig, NightSource
from pipelines.nightly.plan import foresee
from pipelines.runtime.run_record import follow, records
from pipelines.runtime.workspace import reports_of

Progress = Callable[[str], None]
EmbedProgress = Callable[[Summary], None]
_GUARDED = "missing.at_most allows"  # how mark_missing says that too many were gone at once


@dataclass
class NightSummary:
    """What a night did: the summary of each step, images that failed among those that were read, seconds by step.

    problems: what a step left undone without the night having failed, such as a clustering that nobody has made yet
    failures: what somebody must look at, though the other steps were done: a source that is not there, or that misses
        more images than it may
    """

    gallery: str
    dry_run: bool = False
    version: int = -1
    images: int = 0
    failed: int = 0
    over_budget: bool = False
    steps: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    config: NightlyConfig,
    *,
    dry_run: bool = False,
    progress: Progress = lambda line: None,
    embedded: EmbedProgress = lambda summary: None,
) -> NightSummary:
    """One night: embed, index, assign, erase, dedup, compact. Safe to be run again after it died, at any step.

    Images go before copies are looked for: none is named as a copy of one that is no more.

    dry_run: only say what would be done. Raises GalleryBusyError while another night is at work on the gallery,
    SourceError where there is no gallery yet and no source has an image.
    """
    _check(config)
    if dry_run:
        found = foresee(config, progress)
        return NightSummary(
            config.gallery, dry_run=True, version=found.version, steps=found.steps, failures=found.failures
        )
    return _night(config, config.gallery, progress, embedded)


@records("nightly")
def _night(config: NightlyConfig, gallery: str, progress: Progress, embedded: EmbedProgress) -> NightSummary:
    place = storage.join(gallery, RUNS)
    with writer_lock(place, "nightly job", progress):
        night = _Night(config, NightSummary(gallery), progress)
        follow(night.summary)
        night.resume()
        for source in config.source:
            night.embed(source, embedded)
        if not Gallery.exists(gallery):
            raise SourceError("; ".join([*night.summary.failures, *night.summary.problems]))
        night.index()
        night.clusters()
        night.erase()
        night.copies()
        night.compact()
        night.summary.version = Gallery(gallery).version
        return night.summary


class _Night:
    """The steps, each of which can be done again, and then does what is left of it."""

    def __init__(self, config: NightlyConfig, summary: NightSummary, progress: Progress):
        self.config, self.summary, self.progress = config, summary, progress
        self.gallery = config.gallery

    @contextmanager
    def _step(self, name: str, about: str = "") -> Iterator[None]:
        """Book the time of a step. A source's name is told to people, and kept out of the run's record."""
        self.progress(f"{name} {about}".rstrip())
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self.summary.seconds.get(name, 0.0) + time.monotonic() - began
            self.summary.seconds[name] = round(spent, 3)

    def _done(self, name: str, found: Any) -> None:
        self.summary.steps[name] = found.to_dict() if hasattr(found, "to_dict") else asdict(found)

    def resume(self) -> None:
        """Erasures that a crash broke off, before anything else looks at what they were to take out."""
        if not Gallery.exists(self.gallery):
            return
        with self._step("erase"):
            found = erase.resume(self.gallery, self.progress)
        if found.receipts:
            self._done("erase unfinished", found)

    def embed(self, source: NightSource, progress: EmbedProgress) -> None:
        """New and changed images of a source; what it no longer lists is marked. Without it, the night goes on."""
        name = source.title
        with self._step("embed", name):
            try:
                open_source(source.to_source())
            except SourceError as error:
                self.summary.failures.append(f"{name}: {error}")
                return
            try:
                found = embed.run(embed_config(self.config, source), self.gallery, progress)
            except (SourceError, StorageError) as error:
                # A place where images come and go may be empty; one whose images are watched may not.
                empty = isinstance(error, SourceError) and source.missing == "keep"
                (self.summary.problems if empty else self.summary.failures).append(f"{name}: {error}")
                return
        self._done(f"embed {name}", found)
        self._count(name, found)

    def _count(self, name: str, found: Summary) -> None:
        summary, config = self.summary, self.config.night
        if found.missing_ignored:
            told = summary.failures if found.missing_ignored.endswith(_GUARDED) else summary.problems
            told.append(f"{name}: missing images were left alone: {found.missing_ignored}")
        summary.images += found.images
        summary.failed += found.failed
        summary.over_budget = summary.failed > max(config.few_failed, config.max_failed * summary.images)

    def index(self) -> None:
        """The search index, in proportion to what changed."""
        with self._step("index"):
            found = index.run(IndexConfig(self.config.index), self.gallery, progress=self.progress)
        self._done("index", found)

    def clusters(self) -> None:
        """New faces into the clusters there are; the first ones are made where that is asked for."""
        if self.config.night.clusters == "no":
            return
        with self._step("assign"):
            lacking = _no_clusters(self.gallery)
            if not lacking:
                self._done("assign", cluster_assign.run(self.gallery, progress=self.progress))
            elif self.config.night.clusters == "make":
                self._first_clusters()
            else:
                self.summary.problems.append(lacking)

    def _first_clusters(self) -> None:
        config = cluster.ClusterConfig(self.config.cluster, self.config.graph)
        try:
            self._done("cluster", cluster.run(config, self.gallery, self.progress))
        except GalleryBusyError:
            raise
        except GalleryError as error:  # no face yet, or too few to say from where on two are two persons
            self.summary.problems.append(f"no clusters were made: {error}")

    def erase(self) -> None:
        """What is past its time, and what its source lists no more."""
        with self._step("erase"):
            for name, selection in erasures(self.config):
                found = erase.run(selection, self.gallery, may_return=selection.missing, progress=self.progress)
                if found.images or found.receipts:
                    self._done(f"erase {name}", found)

    def copies(self) -> None:
        """New images against all."""
        if not self.config.night.dedup:
            return
        with self._step("dedup"):
            found = dedup_new.run(DedupConfig(self.config.dedup), self.gallery, self.progress)
        self._done("dedup", found)

    def compact(self) -> None:
        """Small files of the table into large ones, when there are enough of them."""
        with self._step("compact"):
            self._done("compact", compact.run(self.config.compact, self.gallery))


def erasures(config: NightlyConfig) -> list[tuple[str, Selection]]:
    """What a night erases, by name. Images past their time do not come back; those that were missing may."""
    found = []
    for source in config.source:
        if source.retention_days is not None:
            aged = Selection(source=source.title, older_than_days=source.retention_days)
            found.append((f"retention {source.title}", aged))
        if source.missing == "erase":
            found.append((f"missing {source.title}", Selection(source=source.title, missing=True)))
    return found


def embed_config(config: NightlyConfig, source: NightSource) -> EmbedConfig:
    """What `embed` is told about a source."""
    policy = "keep" if source.missing == "keep" else "mark"
    missing = MissingConfig(policy, config.night.missing_at_most)  # type: ignore[arg-type]
    parts = {name: getattr(config, name) for name in ("read", "decode", "detect", "align", "embed", "run")}
    return EmbedConfig(source.to_source(), missing=missing, **parts)


def _no_clusters(gallery: str) -> str:
    """Why new faces cannot be assigned; asked before a run of it is recorded as failed. Empty where they can."""
    table = Gallery(gallery)
    if os.path.isdir(os.path.join(reports_of(table), f"{cluster.NAME}.old")):  # a run ended between two renames
        return ""
    try:
        tables.read(table.path, tables.CLUSTERS, ["cluster"])
    except EvaluationError as error:
        return str(error)
    return ""


def _check(config: NightlyConfig) -> None:
    if not config.gallery:
        raise ConfigError('the config names no gallery: gallery = "..."')
    if not config.source or not all(source.uri for source in config.source):
        raise ConfigError('the config names no source: [[source]] uri = "..."')
    titles = [source.title for source in config.source]
    twice = {title for title in titles if titles.count(title) > 1}
    if twice:
        raise ConfigError(f"two sources are called {twice.pop()!r}: give each a name of its own (source.name)")
