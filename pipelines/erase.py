"""erase: delete images from a gallery, in steps that a crash cannot leave half done, and write a receipt."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from zipfile import BadZipFile

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds

import facepipe
from facepipe import storage
from facepipe.curation.report_folders import get_report_name, is_disposable, is_our_listing, owns_file
from facepipe.erasure import pending, vectors
from facepipe.erasure.erased_data import ErasedData
from facepipe.erasure.foreign import mentions_erased
from facepipe.erasure.receipt import Receipt, save_receipt
from facepipe.erasure.reports import scrub_report, scrub_reports
from facepipe.erasure.selection import SelectedImages, Selection, select_images
from facepipe.errors import FacepipeError, GalleryBusyError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import Action, RewriteTrace, plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.maintenance.vacuum import delete_history, delete_unreferenced, find_unreferenced
from facepipe.index import manifest as manifests
from facepipe.observe.runs import new_run_id
from facepipe.storage.cache import get_cache_folder
from facepipe.storage.lease import LEASE_FILE, Lease, hold_lease
from facepipe.storage.owned import delete_owned
from facepipe.storage.store import delete_copies, open_store
from pipelines.cluster import assign as cluster_assign
from pipelines.runtime.run_record import PhaseTimer, attach_summary, get_current_run, record_calls
from pipelines.runtime.workspace import REPORTS

Progress = Callable[[str], None]
_BATCH_ROWS = 65536


@dataclass
class EraseSummary:
    """What was erased, or would be (dry run).

    Attributes:
        images: images that were deleted.
        faces: faces that were deleted.
        rows: rows that were deleted.
        dry_run: nothing was deleted; the counts say what would be.
        receipts: paths of receipts, those of interrupted erasures that were completed first.
        foreign: files below reports/ that facepipe did not write and that hold erased data. They are left as they are.
        seconds: wall clock by step.
    """

    images: int = 0
    faces: int = 0
    rows: int = 0
    dry_run: bool = False
    receipts: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Leases:
    """The leases that an erasure holds from its beginning to its end."""

    gallery: Lease
    index: Lease


def run(
    selection: Selection,
    gallery: str,
    *,
    dry_run: bool = False,
    may_return: bool = False,
    progress: Progress = lambda line: None,
) -> EraseSummary:
    """Erase images: rows, vectors, thumbnails, report entries, old files, and the table's older log.

    Searches stop returning them in the first step. An erasure that a crash interrupted is completed first, whatever the
    selection is.

    Args:
        selection: the images.
        gallery: folder or URL of the gallery.
        dry_run: count only, and write nothing, not even a record of the run.
        may_return: let a later `embed` take the images in again.
        progress: called with a line per step.

    Raises:
        ConfigError: the selection is empty or invalid.
        GalleryBusyError: another run writes to the gallery, its index or its reports.
    """
    table = Gallery(gallery)
    selection.build_filter(datetime.now(UTC))  # refuse an empty selection before anything is done
    if dry_run:
        selected = select_images(table, selection)
        return EraseSummary(selected.images, len(selected.faces), selected.rows, dry_run=True)
    return _erase(selection, table.path, may_return, progress)


@record_calls("erase")
def _erase(selection: Selection, gallery: str, may_return: bool, progress: Progress) -> EraseSummary:
    summary = EraseSummary()
    attach_summary(summary)
    with _acquire_leases(gallery, progress) as leases:
        erasure = _Erasure(gallery, leases, summary, progress)
        # Complete older erasures first, and select only then, in the table that they leave.
        erasure.resume()
        selected = select_images(Gallery(gallery), selection)
        summary.images = selected.images
        summary.faces = len(selected.faces)
        summary.rows = selected.rows
        if selected.images:
            receipt = _create_receipt(gallery, selection, selected, is_suppressed=not may_return)
            erasure.erase(receipt, selected)
    return summary


def resume(gallery: str, progress: Progress = lambda line: None) -> EraseSummary:
    """Complete an erasure that a crash interrupted, if there is one."""
    summary = EraseSummary()
    table = Gallery(gallery)
    if pending.read_unfinished(table.path):
        with _acquire_leases(table.path, progress) as leases:
            _Erasure(table.path, leases, summary, progress).resume()
    return summary


@contextmanager
def _acquire_leases(gallery: str, progress: Progress) -> Iterator[_Leases]:
    """Acquire the leases of the gallery and its index.

    The lease of the reports is acquired later, because other steps acquire it in between.
    """
    reports = storage.join(gallery, REPORTS)
    index = storage.join(gallery, manifests.FOLDER)
    with (
        hold_lease(gallery, "gallery", progress) as gallery_lease,
        hold_lease(index, "index", progress) as index_lease,
    ):
        if next(storage.list_files(reports), None) is not None:
            with hold_lease(reports, "reports", progress):
                pass  # so that the erasure is refused now, and not half-way
        yield _Leases(gallery_lease, index_lease)


def _create_receipt(gallery: str, selection: Selection, selected: SelectedImages, *, is_suppressed: bool) -> Receipt:
    return Receipt(
        id=new_run_id(),
        gallery=Gallery(gallery).id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        chosen_by=selection.list_conditions(),
        facepipe=facepipe.__version__,
        images=selected.images,
        faces=len(selected.faces),
        rows=selected.rows,
        version_before=selected.version,
        suppressed=is_suppressed,
    )


class _Erasure:
    """The steps of erasures. Each step can be repeated, and then does what is left of it."""

    def __init__(self, gallery: str, leases: _Leases, summary: EraseSummary, progress: Progress) -> None:
        self.gallery = gallery
        self.leases = leases
        self.summary = summary
        self.progress = progress

    def resume(self) -> None:
        """Complete interrupted erasures."""
        for receipt, selected in pending.read_unfinished(self.gallery):
            self.progress(f"completing the interrupted erasure {receipt.id}")
            self._run_steps(receipt, selected)

    def erase(self, receipt: Receipt, selected: SelectedImages) -> None:
        """Run all steps of a new erasure."""
        # The receipt names what is erased by hashes only. The pending file holds the plain lists until the end.
        receipt.hashes = {
            "uris": receipt.hash_values(selected.uris.to_pylist()),
            "images": receipt.hash_values(selected.contents.to_pylist()),
            "faces": receipt.hash_values(map(str, selected.faces.to_pylist())),
        }
        pending.write_pending(self.gallery, receipt, selected)
        self._run_steps(receipt, selected)

    def _run_steps(self, receipt: Receipt, selected: SelectedImages) -> None:
        phases = PhaseTimer(self.summary.seconds)
        # 1. From here on no search returns the faces, and no run embeds the images again.
        if receipt.suppressed:
            uris = selected.uris.to_pylist()
            suppressed.suppress_images(self.gallery, receipt.id, uris, selected.contents.to_pylist())
        removal = self._hide_vectors(receipt, selected)
        phases.end("hide")
        self.progress(f"{len(selected.uris)} images, {len(selected.faces)} faces: no search returns them any more")
        # 2. The rows leave the table.
        self._remove_rows(receipt, selected)
        phases.end("rows")
        # 3. The vectors leave the index.
        self._remove_vectors(receipt, removal)
        phases.end("index")
        # 4. The reports lose what they hold.
        self._scrub_reports(receipt, self._describe_erased(selected))
        phases.end("reports")
        # 5. Old files are deleted.
        self._delete_files(receipt)
        # After a power cut nothing of it comes back: the receipt would say what is not so.
        self._sync_disks()
        phases.end("vacuum")
        # 6. The receipt is complete.
        path = save_receipt(self.gallery, receipt)
        pending.delete_pending(self.gallery, receipt)
        self.summary.receipts.append(path)
        _count_erased(receipt.images)

    def _hide_vectors(self, receipt: Receipt, selected: SelectedImages) -> vectors.VectorRemoval:
        if not manifests.exists(self.gallery):
            return vectors.VectorRemoval()
        removal = vectors.hide_vectors(self.gallery, selected, self.leases.index.check)
        # A repeated step may find less than the first attempt did, so the larger count stays.
        receipt.vectors = max(receipt.vectors, removal.vectors)
        receipt.index_before = receipt.index_before | removal.before
        return removal

    def _remove_rows(self, receipt: Receipt, selected: SelectedImages) -> None:
        """Remove rows from the table.

        What the receipt says of it is saved before the commit, because nobody could tell afterwards.
        """

        # The commit may call this again if another one came first, so it plans from the newest table each time.
        def rewrite() -> list[Action]:
            table = Gallery(self.gallery)
            trace = RewriteTrace()
            plan = plan_rewrite_of_uris(selected.uris.to_pylist(), lambda rows, mask: rows.filter(pc.invert(mask)))
            actions = list(rewrite_files(table, plan, trace))
            if actions:
                receipt.version_before = table.version
                receipt.version_after = table.version + 1
                receipt.files_before |= {name: digest or "" for name, digest in trace.before}
                receipt.files_after |= {name: digest or "" for name, digest in trace.after}
            pending.save_progress(self.gallery, receipt)
            return actions

        committer = Committer(Gallery(self.gallery), new_run_id(), self.leases.gallery)
        committer.commit_actions(rewrite, {"job": "erase", "images": receipt.images, "faces": receipt.faces})

    def _remove_vectors(self, receipt: Receipt, removal: vectors.VectorRemoval) -> None:
        if not manifests.exists(self.gallery):
            manifests.sweep(self.gallery, None)  # parts of an index that was never finished
            return

        def prepare_publishing() -> None:
            receipt.index_after |= removal.after
            pending.save_progress(self.gallery, receipt)
            self.leases.index.check()

        vectors.remove_vectors(
            self.gallery,
            removal,
            version_before=receipt.version_before,
            version_after=receipt.version_after,
            check_lease=prepare_publishing,
        )

    def _describe_erased(self, selected: SelectedImages) -> ErasedData:
        """Describe what reports must not hold; a label that other images still have may stay."""
        # The rows are gone by now: a name that still has rows belongs to images that stay.
        names_in_use: set[str] = set()
        has_name = ds.field("identity").isin(selected.names)
        for batch in Gallery(self.gallery).batches(["identity"], has_name, rows=_BATCH_ROWS):
            names_in_use.update(pc.unique(batch["identity"]).to_pylist())
        return ErasedData(
            uris=frozenset(selected.uris.to_pylist()),
            names=frozenset(selected.names.to_pylist()) - names_in_use,
            contents=frozenset(selected.contents.to_pylist()),
            faces=np.sort(selected.faces.to_numpy()),
            marks=np.unique(selected.marks.to_numpy()),
        )

    def _scrub_reports(self, receipt: Receipt, erased: ErasedData) -> None:
        folder = storage.join(self.gallery, REPORTS)
        names = list(storage.list_names(folder))
        if not names:
            return
        # Update the clusters before the lease is held, because the update holds it itself.
        if any(name.split("/")[0] == "cluster" for name in names):
            self._update_clusters()
        with hold_lease(folder, "reports", self.progress) as lease:
            for changed in self._iterate_scrubbed(folder, names, erased):
                # Save the receipt after each file, so that a crash loses no name of a changed file.
                receipt.reports = sorted({*receipt.reports, changed})
                pending.save_progress(self.gallery, receipt)
                lease.check()

    def _iterate_scrubbed(self, folder: str, names: list[str], erased: ErasedData) -> Iterator[str]:
        """Remove erased data from all reports, and yield the name of each file that changed."""
        if open_store(self.gallery, REPORTS).is_complete:
            yield from scrub_reports(folder, erased, self._note_foreign)
            return
        for name in sorted({name.split("/")[0] for name in names if "/" in name}):
            yield from self._scrub_remote_report(name, erased)
        # Objects beside the reports are none of ours, except the lease.
        for name in names:
            if "/" not in name and not name.startswith(LEASE_FILE):
                self._search_remote_object(storage.join(folder, name), erased)

    def _search_remote_object(self, url: str, erased: ErasedData) -> None:
        """Fetch an object that facepipe did not write, and note it if it holds erased data."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, os.path.basename(url))
            with open(path, "wb") as file, storage.open_seekable(url) as source:
                shutil.copyfileobj(source, file)
            if mentions_erased(path, erased):
                self.summary.foreign.append(url)

    def _note_foreign(self, name: str) -> None:
        path = storage.join(self.gallery, REPORTS, name)
        if path not in self.summary.foreign:
            self.summary.foreign.append(path)

    def _scrub_remote_report(self, name: str, erased: ErasedData) -> list[str]:
        """Fetch one report of a gallery in an object store, clean it, and upload it if it has changed."""
        store = open_store(self.gallery, f"{REPORTS}/{name}")
        report = get_report_name(name)
        # A disposable report is deleted as a whole, without fetching it.
        if is_disposable(name) and report is not None and is_our_listing(report, list(storage.list_names(store.url))):
            others = delete_owned(store.url, lambda inner: owns_file(report, inner))
            if not others:
                return [f"{name}/"]
        store.pull()
        changed = list(scrub_report(store.folder, erased, lambda inner: self._note_foreign(f"{name}/{inner}")))
        if changed:
            store.push(last="report.html")
        return [f"{name}/{inner}" for inner in changed]

    def _update_clusters(self) -> None:
        """Update the clusters, if that can be done; `scrub_reports` only removes what belongs to the erased alone."""
        try:
            cluster_assign.run(self.gallery, progress=self.progress)
        except GalleryBusyError:
            raise
        except (FacepipeError, OSError, ValueError, KeyError, BadZipFile) as error:
            self.progress(f"the clusters could not be updated ({type(error).__name__})")

    def _delete_files(self, receipt: Receipt) -> None:
        """Delete files that no longer belong to the table, its older log, and this machine's copies."""
        self.leases.gallery.check()
        table = Gallery(self.gallery)
        # Files of both lists may have been replaced once more since.
        current_files = {file["path"] for file in table.files()}
        receipt.files_after = {name: digest for name, digest in receipt.files_after.items() if name in current_files}
        if manifests.exists(self.gallery):
            shards = {entry.name for entry in manifests.load(self.gallery).shards}
            receipt.index_after = {
                name: digest for name, digest in receipt.index_after.items() if name.split("/")[0] in shards
            }
        # Count and save before deleting, because a repeated step finds nothing to count.
        receipt.files_deleted = max(receipt.files_deleted, len(find_unreferenced(table)))
        pending.save_progress(self.gallery, receipt)
        delete_unreferenced(table)
        receipt.log_files_deleted += delete_history(table)
        delete_copies(self.gallery)

    def _sync_disks(self) -> None:
        """Have what was changed and deleted stay so, on every disk that holds a part of the gallery or a copy."""
        folders = [self.gallery, *(storage.join(self.gallery, name) for name in ("faces", manifests.FOLDER, REPORTS))]
        storage.sync_disks(*([get_cache_folder()] if storage.is_remote(self.gallery) else folders))


def _count_erased(images: int) -> None:
    run = get_current_run()
    if run is not None:
        run.add_count("erased_images", images)
