"""Check whether a night can run: models, gallery, sources, room. No image is embedded and nothing is left behind."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from facepipe import storage
from facepipe.errors import FacepipeError, SourceError, StorageError
from facepipe.extras import require_module
from facepipe.gallery import Contract, Gallery
from facepipe.index.plan import format_size, make_plan, parse_size
from facepipe.models.runtime.memory import measure_available_memory
from facepipe.schema import OK, WORK_ITEM
from facepipe.sources import SourceConfig, open_source
from facepipe.storage.cache import get_cache_folder
from facepipe.storage.conditional import require_usable_place
from pipelines.embed.checks import check_settings, load_models
from pipelines.job import check_job, count_indexed, open_gallery
from pipelines.nightly.config import NightlyConfig, NightSource
from pipelines.nightly.preview import NightPreview, preview_source
from pipelines.runtime.plan import detect_local_resources
from pipelines.runtime.plan import make_plan as make_worker_plan

# What docs/performance.md and docs/operations.md measured.
_WORKER_BYTES = 410 << 20  # with the default models, on Ray
_DRIVER_BYTES = 290 << 20
_IMAGE_BYTES = 5_000  # in the table, with a face and its thumbnail
_LISTED_BYTES = 107  # in TMPDIR, per image that the gallery knows or the source lists
# A rewritten part lies beside the part that it replaces for some hours.
_TABLE_COPIES = 2


@dataclass(frozen=True)
class CheckResult:
    """The outcome of one check.

    Attributes:
        what: what was checked.
        detail: what was found; empty if something is wrong.
        problem: what is wrong, and what to do; empty if nothing is.
    """

    what: str
    detail: str = ""
    problem: str = ""


def check_night(config: NightlyConfig, on_progress: Callable[[str], None] = lambda line: None) -> list[CheckResult]:
    """Check everything that a night needs. A check that fails does not stop the others.

    The sources are listed in full. The first image of each is read, and none is decoded or embedded. To see whether
    the gallery's place can be written to, a small file is written there and deleted.

    Args:
        config: settings of the job.
        on_progress: receives the name of each check.

    Raises:
        ConfigError: if the config names no gallery or no source.
    """
    check_job(config.gallery, config.source)
    night = _NightCheck(config, on_progress)
    night.check("models", night.check_models)
    night.check("packages", night.check_packages)
    night.check("gallery", night.check_gallery)
    night.check("write access", night.check_write_access)
    for source in config.source:
        night.check_source(source)
    night.check("disk", night.check_disk)
    night.check("memory", night.check_memory)
    return night.results


class _NightCheck:
    """The checks of a night, and what they found."""

    def __init__(self, config: NightlyConfig, on_progress: Callable[[str], None]):
        self.results: list[CheckResult] = []
        self._config = config
        self._on_progress = on_progress
        self._embed_config = config.build_source_config(config.source[0])
        self._contract: Contract | None = None
        self._gallery: Gallery | None = None
        self._to_come = 0

    def check(self, what: str, examine: Callable[[], str]) -> None:
        """Run a check and store its result: what it returns, or why it failed."""
        self._on_progress(what)
        try:
            self.results.append(CheckResult(what, detail=examine()))
        except FacepipeError as error:
            self.results.append(CheckResult(what, problem=str(error)))

    def check_models(self) -> str:
        """Load the models."""
        self._contract = check_settings(self._embed_config)
        load_models(self._embed_config)
        return f"{self._contract.detector} and {self._contract.embedder} load"

    def check_packages(self) -> str:
        """Require the packages of the steps, and a plan of workers that this machine can carry out."""
        require_module("faiss", "the search index")
        places = [self._config.gallery, *(source.uri for source in self._config.source)]
        if any(storage.is_remote(place) for place in places):
            require_module("obstore", "an object store")
        if "RAY_ADDRESS" in os.environ:
            return f"installed; workers run on the cluster {os.environ['RAY_ADDRESS']} if the night is large"
        run = self._config.run
        models = self._config.build_embed_config(SourceConfig()).gpu_models
        plan = make_worker_plan(detect_local_resources(), run.workers, run.layout, models)
        return f"installed; {plan.workers} workers"

    def check_gallery(self) -> str:
        """Open the gallery and compare its contract, or see that its place is free."""
        self._gallery = open_gallery(self._config.gallery)
        if self._gallery is None:
            Gallery.require_free(self._config.gallery)
            return f"{self._config.gallery} is new"
        # Models that are not known have been reported.
        if self._contract is not None:
            self._gallery.contract.require(self._contract, f"the gallery {self._config.gallery!r}")
        return f"{self._config.gallery}, version {self._gallery.version}"

    def check_write_access(self) -> str:
        """Write and delete a small file where the gallery is."""
        require_usable_place(self._config.gallery)
        return f"{self._config.gallery} can be written to"

    def check_source(self, source: NightSource) -> None:
        """List a source, read its first image, and note what the night would refuse."""
        name = f"source {source.title}"
        preview = NightPreview()

        def examine() -> str:
            self._read_first_image(source)
            preview_source(self._config, source, self._gallery, preview)
            self._to_come += preview.images
            known = sum(counts["skipped"] for counts in preview.steps.values() if "skipped" in counts)
            notes = "".join(f"; {note}" for note in preview.problems)
            return f"{preview.images} images to embed, {known} known{notes}"

        self.check(name, examine)
        # The first failure takes the place of the result; each further one is a line.
        if preview.failures and not self.results[-1].problem:
            self.results.pop()
        self.results += [CheckResult(name, problem=failure) for failure in preview.failures]

    def _read_first_image(self, source: NightSource) -> None:
        """Read the bytes of the first image that can be listed, if there is one."""
        first = next((item for item in open_source(source.to_source()) if item.listing_error is None), None)
        if first is None:
            return
        read = self._config.read(pa.Table.from_pylist([{**first._asdict(), "previous": None}], WORK_ITEM))
        status = read["status"][0].as_py()
        # A too large image becomes a row of the gallery, like any other that fails alone.
        if status not in (OK, "too_large"):
            raise SourceError(f"cannot read {first.uri}: {read['error'][0]}")

    def check_disk(self) -> str:
        """Compare what the night needs with the room on each disk."""
        gallery = self._config.gallery
        indexed = count_indexed(self._gallery) if self._gallery else {"faces": 0, "indexed": 0}
        totals = self._gallery.count_totals() if self._gallery else None
        images = totals.rows if totals else 0
        per_image = max(_IMAGE_BYTES, totals.bytes // images if totals and images else 0)
        new_faces = indexed["faces"] - indexed["indexed"] + self._to_come
        index_bytes = make_plan(max(1, indexed["faces"] + self._to_come), 1 << 62, 0).disk
        # An index that is there grows by what is new; the first one is built whole.
        if indexed["indexed"]:
            index_bytes = index_bytes * new_faces // max(1, indexed["faces"] + self._to_come)
        needed = {tempfile.gettempdir(): _LISTED_BYTES * (images + self._to_come)}
        table_needed = _TABLE_COPIES * per_image * self._to_come
        if storage.is_remote(gallery):
            needed[get_cache_folder()] = index_bytes
        else:
            needed[gallery] = table_needed + index_bytes
        return _compare_room(needed)

    def check_memory(self) -> str:
        """Compare what workers and the index need with the memory that is free."""
        indexed = count_indexed(self._gallery) if self._gallery else {"faces": 0}
        budget = parse_size(self._config.index.memory)
        # The index is built after the workers have ended.
        index_bytes = make_plan(max(1, indexed["faces"] + self._to_come), budget, _DRIVER_BYTES).memory
        available = measure_available_memory()
        workers = 1
        if self._config.run.runner != "inline" and "RAY_ADDRESS" not in os.environ:
            layout = self._config.run.layout
            workers = make_worker_plan(detect_local_resources(), self._config.run.workers, layout).workers
        needed = max(_DRIVER_BYTES + workers * _WORKER_BYTES, index_bytes)
        detail = f"about {format_size(needed)} needed for {workers} workers, {format_size(available)} free"
        if needed > available:
            raise StorageError(f"{detail}: set run.workers to less, or end other programs")
        return detail


def _compare_room(needed: dict[str, int]) -> str:
    """Compare the bytes needed with those free, disk by disk.

    Args:
        needed: bytes by folder, which may not exist yet.

    Raises:
        StorageError: a disk lacks room.
    """
    # Folders on one disk share its room.
    by_disk: dict[int, list[str]] = {}
    for folder in needed:
        existing = _find_existing(folder)
        by_disk.setdefault(os.stat(existing).st_dev, []).append(folder)
    details = []
    lacks_room = False
    for folders in by_disk.values():
        total = sum(needed[folder] for folder in folders)
        free = shutil.disk_usage(_find_existing(folders[0])).free
        lacks_room |= total > free
        details.append(f"about {format_size(total)} needed in {' and '.join(folders)}, {format_size(free)} free")
    detail = "; ".join(details)
    if lacks_room:
        raise StorageError(f"{detail}: make room, or choose another disk")
    return detail


def _find_existing(folder: str) -> str:
    """Return a folder, or the nearest one above it that exists."""
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder
