"""erase: images leave a gallery for good, in steps that a crash cannot leave half done; a receipt says what went."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from zipfile import BadZipFile

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds

import facepipe
from facepipe import storage
from facepipe.erasure import pending, receipt, vectors
from facepipe.erasure.erased_data import ErasedData
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.reports import is_disposable, scrub_reports
from facepipe.erasure.selection import SelectedImages, Selection, select_images
from facepipe.errors import FacepipeError, GalleryBusyError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer
from facepipe.gallery.commits.rewrite import Action, RewriteTrace, plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.maintenance.vacuum import delete_history, delete_unreferenced, find_unreferenced
from facepipe.index import manifest as manifests
from facepipe.observe.runs import new_run_id
from facepipe.storage.lease import LEASE_FILE, Lease, hold_lease
from facepipe.storage.store import delete_copies, open_store
from pipelines.cluster import assign as cluster_assign
from pipelines.runtime.run_record import PhaseTimer, attach_summary, get_current_run, record_calls
from pipelines.runtime.workspace import REPORTS

Progress = Callable[[str], None]
_ROWS = 65536


@dataclass
class EraseSummary:
    """What was erased, or (dry_run) would be. receipts: paths, those of erasures that were taken up again first."""

    images: int = 0
    faces: int = 0
    rows: int = 0
    dry_run: bool = False
    receipts: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    selection: Selection,
    gallery: str,
    *,
    dry_run: bool = False,
    may_return: bool = False,
    progress: Progress = lambda line: None,
) -> EraseSummary:
    """Erase the images that a selection means: rows, vectors, thumbnails, report entries, old files, the older log.

    Searches stop returning them in the first step. may_return: do not keep them from being embedded again. dry_run:
    only count, and write nothing, no record of the run either. An erasure that a crash broke off is finished first,
    whatever is asked for now. Raises GalleryBusyError where another run writes to the gallery, its index or its
    reports.
    """
    table = Gallery(gallery)
    selection.build_filter(datetime.now(UTC))  # a selection that says nothing is refused before anything is done
    if dry_run:
        chosen = select_images(table, selection)
        return EraseSummary(chosen.images, len(chosen.faces), chosen.rows, dry_run=True)
    return _erase(selection, table.path, may_return, progress)


@record_calls("erase")
def _erase(selection: Selection, gallery: str, may_return: bool, progress: Progress) -> EraseSummary:
    summary = EraseSummary()
    attach_summary(summary)
    with _acquire_leases(gallery, progress) as leases:
        steps = _Erasure(gallery, leases, summary, progress)
        steps.resume()
        chosen = select_images(Gallery(gallery), selection)
        summary.images, summary.faces, summary.rows = chosen.images, len(chosen.faces), chosen.rows
        if chosen.images:
            steps.erase(_create_receipt(gallery, selection, chosen, not may_return), chosen)
    return summary


def resume(gallery: str, progress: Progress = lambda line: None) -> EraseSummary:
    """Finish what a crash broke off, if anything."""
    summary, table = EraseSummary(), Gallery(gallery)
    if pending.read_unfinished(table.path):
        with _acquire_leases(table.path, progress) as leases:
            _Erasure(table.path, leases, summary, progress).resume()
    return summary


@contextmanager
def _acquire_leases(gallery: str, progress: Progress) -> Iterator[tuple[Lease, Lease]]:
    """Those of the gallery and of its index. The reports' is taken when their turn comes: others take it in between."""
    reports = storage.join(gallery, REPORTS)
    with (
        hold_lease(gallery, "gallery", progress) as lease,
        hold_lease(storage.join(gallery, manifests.FOLDER), "index", progress) as index_lease,
    ):
        if next(storage.list_files(reports), None) is not None:
            with hold_lease(reports, "reports", progress):
                pass  # refused before anything is done, and not half-way
        yield lease, index_lease


def _create_receipt(gallery: str, selection: Selection, chosen: SelectedImages, suppress_: bool) -> Receipt:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    made = Receipt(new_run_id(), Gallery(gallery).id, now, selection.list_conditions(), facepipe.__version__)
    made.images, made.faces, made.rows, made.suppressed = chosen.images, len(chosen.faces), chosen.rows, suppress_
    made.version_before = chosen.version
    made.hashes = {
        "uris": made.hash_values(chosen.uris.to_pylist()),
        "images": made.hash_values(chosen.contents.to_pylist()),
        "faces": made.hash_values(map(str, chosen.faces.to_pylist())),
    }
    return made


class _Erasure:
    """The steps of erasures; each can be done again, and then does what is left of it."""

    def __init__(self, gallery: str, leases: tuple[Lease, Lease], summary: EraseSummary, progress: Progress):
        self.gallery, self.summary, self.progress = gallery, summary, progress
        self.lease, self.index_lease = leases

    def resume(self) -> None:
        """Finish what was broken off."""
        for found, chosen in pending.read_unfinished(self.gallery):
            self.progress(f"finishing the erasure {found.id}, which was broken off")
            self._run_steps(found, chosen)

    def erase(self, made: Receipt, chosen: SelectedImages) -> None:
        """All steps of a new erasure."""
        pending.write_pending(self.gallery, made, chosen)
        self._run_steps(made, chosen)

    def _run_steps(self, made: Receipt, chosen: SelectedImages) -> None:
        phases = PhaseTimer(self.summary.seconds)
        if made.suppressed:
            suppressed.suppress_images(self.gallery, made.id, chosen.uris.to_pylist(), chosen.contents.to_pylist())
        removed = self._hide_vectors(made, chosen)
        phases.end("hide")
        self.progress(f"{len(chosen.uris)} images, {len(chosen.faces)} faces: no search returns them any more")
        self._remove_rows(made, chosen)
        phases.end("rows")
        self._remove_vectors(made, removed)
        phases.end("index")
        self._scrub_reports(made, self._describe_erased(chosen))
        phases.end("reports")
        self._delete_files(made)
        phases.end("vacuum")
        path = receipt.save_receipt(self.gallery, made)
        pending.delete_pending(self.gallery, made)
        self.summary.receipts.append(path)
        _count_erased(made.images)

    def _hide_vectors(self, made: Receipt, chosen: SelectedImages) -> vectors.VectorRemoval:
        if not manifests.exists(self.gallery):
            return vectors.VectorRemoval()
        removed = vectors.hide_vectors(self.gallery, chosen, self.index_lease.check)
        made.vectors, made.index_before = max(made.vectors, removed.vectors), made.index_before | removed.before
        return removed

    def _remove_rows(self, made: Receipt, chosen: SelectedImages) -> None:
        """Rows out of the table. What the receipt says of it is kept before the commit: after it nobody could tell."""

        def actions() -> list[Action]:
            trace, table = RewriteTrace(), Gallery(self.gallery)
            what = plan_rewrite_of_uris(chosen.uris.to_pylist(), lambda rows, mask: rows.filter(pc.invert(mask)))
            found = list(rewrite_files(table, what, trace))
            if found:
                made.version_before, made.version_after = table.version, table.version + 1
                made.files_before |= {name: digest or "" for name, digest in trace.before}
                made.files_after |= {name: digest or "" for name, digest in trace.after}
            pending.save_progress(self.gallery, made)
            return found

        commit = Committer(Gallery(self.gallery), new_run_id(), self.lease)
        commit.commit_actions(actions, {"job": "erase", "images": made.images, "faces": made.faces})

    def _remove_vectors(self, made: Receipt, removed: vectors.VectorRemoval) -> None:
        if not manifests.exists(self.gallery):
            manifests.sweep(self.gallery, None)  # pieces of an index that was never finished
            return

        def before_publishing() -> None:
            made.index_after |= removed.after
            pending.save_progress(self.gallery, made)
            self.index_lease.check()

        vectors.remove_vectors(self.gallery, removed, (made.version_before, made.version_after), before_publishing)

    def _describe_erased(self, chosen: SelectedImages) -> ErasedData:
        left = set[str]()
        for batch in Gallery(self.gallery).batches(["identity"], ds.field("identity").isin(chosen.names), rows=_ROWS):
            left.update(pc.unique(batch["identity"]).to_pylist())
        return ErasedData(
            frozenset(chosen.uris.to_pylist()),
            frozenset(chosen.names.to_pylist()) - left,
            frozenset(chosen.contents.to_pylist()),
            np.sort(chosen.faces.to_numpy()),
            np.unique(chosen.marks.to_numpy()),
        )

    def _scrub_reports(self, made: Receipt, gone: ErasedData) -> None:
        place = storage.join(self.gallery, REPORTS)
        names = sorted({found.url.removeprefix(place + "/").split("/")[0] for found in storage.list_files(place)})
        if not names:
            return
        if "cluster" in names:
            self._update_clusters()
        with hold_lease(place, "reports", self.progress) as lease:
            if open_store(self.gallery, REPORTS).is_complete:
                changes = scrub_reports(place, gone)
            else:
                changes = chain.from_iterable(self._scrub_remote_report(name, gone) for name in names)
            for changed in changes:
                made.reports = sorted({*made.reports, changed})
                pending.save_progress(self.gallery, made)
                lease.check()

    def _update_clusters(self) -> None:
        """Clusters without the erased, where that can be done: `scrub` only takes out what is theirs alone."""
        try:
            cluster_assign.run(self.gallery, progress=self.progress)
        except GalleryBusyError:
            raise
        except (FacepipeError, OSError, ValueError, KeyError, BadZipFile) as error:
            self.progress(f"the clusters could not be brought up to date ({type(error).__name__})")

    def _scrub_remote_report(self, name: str, gone: ErasedData) -> list[str]:
        """One report of a gallery in an object store: fetched, scrubbed, and uploaded where it has changed."""
        if name.startswith(LEASE_FILE):
            return []
        store = open_store(self.gallery, f"{REPORTS}/{name}")
        if is_disposable(name):
            for file in list(storage.list_files(store.url)):
                storage.delete(file.url)
            return [f"{name}/"]
        store.pull()
        found = list(scrub_reports(store.folder, gone))
        if found:
            store.push(last="report.html")
        return [f"{name}/{inner}" for inner in found]

    def _delete_files(self, made: Receipt) -> None:
        self.lease.check()
        table = Gallery(self.gallery)
        now = {file["path"] for file in table.files()}
        made.files_after = {name: digest for name, digest in made.files_after.items() if name in now}
        if manifests.exists(self.gallery):
            kept = {entry.name for entry in manifests.load(self.gallery).shards}
            made.index_after = {name: d for name, d in made.index_after.items() if name.split("/")[0] in kept}
        made.files_deleted = max(made.files_deleted, len(find_unreferenced(table)))
        pending.save_progress(self.gallery, made)
        delete_unreferenced(table)
        made.log_files_deleted += delete_history(table)
        delete_copies(self.gallery)


def _count_erased(images: int) -> None:
    run = get_current_run()
    if run is not None:
        run.add_count("erased_images", images)
