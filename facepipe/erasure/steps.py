"""The steps of an erasure. Each can be repeated, and then does what is left of it.

An erasure has four parts: rows, index, reports and decisions. Each is done under the lease of its folder, by whoever
holds that lease or can get it. So a job that runs for weeks and holds one lease does its part of an erasure that
another process has recorded, and the other process does the rest.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from facepipe import storage
from facepipe.curation.report_folders import delete_uploads as delete_report_uploads
from facepipe.curation.report_folders import get_report_name, is_disposable, is_our_listing, owns_file
from facepipe.decisions import table as decision_table
from facepipe.decisions.erase import ErasedPerson, find_lost_names, scrub_decisions
from facepipe.erasure import pending, vectors
from facepipe.erasure.chain import save_receipt
from facepipe.erasure.erased_data import ErasedData
from facepipe.erasure.foreign import mentions_erased
from facepipe.erasure.limits import count_rows, is_beyond
from facepipe.erasure.pending import DECISIONS, FILES, INDEX, REPORTS, ROWS, PendingErasure
from facepipe.erasure.purges import plan_purge, record_purge
from facepipe.erasure.receipt import Receipt
from facepipe.erasure.reports import scrub_report, scrub_reports
from facepipe.erasure.selection import SelectedImages, select_again
from facepipe.errors import ConfigError, GalleryBusyError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.commits.committer import Committer, fence_commits
from facepipe.gallery.commits.rewrite import Action, RewriteTrace, plan_rewrite_of_uris, rewrite_files
from facepipe.gallery.maintenance.vacuum import claim_unreferenced, delete_files, delete_history, delete_uploads
from facepipe.index import manifest as manifests
from facepipe.observe.runs import new_run_id
from facepipe.sources.labels import format_label
from facepipe.storage.cache import get_cache_folder
from facepipe.storage.lease import ERASURE, LEASE_FILE, Lease, hold_lease
from facepipe.storage.owned import delete_owned
from facepipe.storage.store import delete_copies, open_store
from facepipe.storage.uploads import UploadsUnknownError

REPORTS_FOLDER = "reports"
_BATCH_ROWS = 65536

Progress = Callable[[str], None]
_is_advancing: ContextVar[bool] = ContextVar("facepipe.erasure.steps", default=False)


@dataclass
class HeldLeases:
    """The leases that a run holds already. The others are acquired if they are free.

    Attributes:
        gallery: of the gallery.
        index: of its index.
        reports: of its reports.
        committer: of the run that holds the gallery's lease. Its parts that are not committed yet are not touched.
        awaits_blocks: whether an erasure stays open while finished blocks of that run hold its images.
    """

    gallery: Lease | None = None
    index: Lease | None = None
    reports: Lease | None = None
    committer: Committer | None = None
    awaits_blocks: bool = False


@dataclass
class Advance:
    """What an attempt to advance the recorded erasures did.

    Attributes:
        receipts: paths of the receipts of erasures that were completed.
        foreign: files below the reports that facepipe did not write and that hold erased data.
        is_complete: whether no erasure is left.
        doubts: why images that an erasure seems to mean stay.
        keyless: why no receipt could be written, by the id of the erasure: it needs a key that is not set.
        seconds: wall clock by step.
    """

    receipts: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    is_complete: bool = True
    doubts: list[str] = field(default_factory=list)
    keyless: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def advance_erasures(
    gallery: str,
    held: HeldLeases | None = None,
    progress: Progress = lambda line: None,
    *,
    update_clusters: Callable[[], None] | None = None,
    parts: tuple[str, ...] = pending.PARTS,
    skipped: Collection[str] = (),
) -> Advance:
    """Do all steps of recorded erasures for which the leases can be had now.

    Args:
        gallery: folder or URL of the gallery.
        held: the leases that the caller holds.
        progress: called with a line per step.
        update_clusters: brings the clusters up to date. It acquires the lease of the reports itself.
        parts: the parts to do.
        skipped: ids of erasures to leave alone.

    Returns:
        What was done. Call it again later if it is not complete.

    Raises:
        GalleryBusyError: a lease was lost.
        StorageError: something cannot be read, written or deleted.
    """
    advance = Advance()
    own = held or HeldLeases()
    if not pending.read_unfinished(gallery):
        return advance
    with ExitStack() as stack:
        stack.callback(_is_advancing.reset, _is_advancing.set(True))
        leases = _acquire_leases(gallery, own, parts, progress, stack)
        # Read again: another run may have done something before the leases were acquired.
        for erasure in pending.read_unfinished(gallery):
            if erasure.id in skipped:
                advance.is_complete = False
                continue
            steps = _ErasureSteps(gallery, own, leases, erasure, advance, progress)
            if not steps.run(parts, update_clusters):
                advance.is_complete = False
    return advance


def is_advancing() -> bool:
    """Tell whether this code is part of an attempt: what updates the clusters must not begin another one."""
    return _is_advancing.get()


def _acquire_leases(
    gallery: str, held: HeldLeases, parts: tuple[str, ...], progress: Progress, stack: ExitStack
) -> HeldLeases:
    """Acquire the leases of the gallery and its index, if they are free.

    The lease of the reports is acquired later, because bringing the clusters up to date acquires it as well.
    """
    leases = replace(held)
    if leases.gallery is None:
        leases.gallery = stack.enter_context(try_lease(gallery, "gallery", progress))
    if leases.index is None and INDEX in parts:
        folder = storage.join(gallery, manifests.FOLDER)
        leases.index = stack.enter_context(try_lease(folder, "index", progress))
    return leases


@contextmanager
def try_lease(folder: str, kind: str, progress: Progress) -> Iterator[Lease | None]:
    """Hold the lease of a folder; yield None if another run holds it."""
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(hold_lease(folder, kind, progress, purpose=ERASURE))
        except GalleryBusyError:
            lease = None
        yield lease


class _ErasureSteps:
    """The steps of one erasure."""

    def __init__(
        self,
        gallery: str,
        held: HeldLeases,
        leases: HeldLeases,
        erasure: PendingErasure,
        advance: Advance,
        progress: Progress,
    ) -> None:
        self.gallery = gallery
        self.held = held  # by the job that does the steps
        self.leases = leases  # these, and those that were free
        self.erasure = erasure
        self.receipt = erasure.receipt
        self.advance = advance
        self.progress = progress

    def run(self, parts: tuple[str, ...], update_clusters: Callable[[], None] | None) -> bool:
        """Do the steps that can be done now, and return whether the erasure is complete."""
        if not self._is_done(ROWS) and self.leases.gallery is not None and ROWS in parts:
            with self._measure("rows"):
                self._remove_rows(self.leases.gallery)
        # The others come after the rows: they look at what the table still holds.
        if self._is_done(ROWS):
            # The index says which version it is of, so a version that keeps runs out that were asleep comes first.
            if self.leases.gallery is not None and not self._is_done(INDEX):
                fence_commits(self.gallery, self.leases.gallery)
            if not self._is_done(INDEX) and self.leases.index is not None:
                with self._measure("index"):
                    self._remove_vectors(self.leases.index)
            if not self._is_done(REPORTS) and REPORTS in parts:
                with self._measure("reports"):
                    self._clean_reports(update_clusters)
            if not self._is_done(DECISIONS) and DECISIONS in parts:
                with self._measure("decisions"):
                    self._clean_decisions()
        if not self._refresh() or not self.erasure.done.issuperset(pending.PARTS):
            return not pending.is_pending(self.gallery, self.erasure.id)
        # A run that reads the old files holds the lease of the index or the reports, so none does by now.
        if FILES not in self.erasure.done:
            if self.leases.gallery is None:
                return False
            with self._measure("vacuum"):
                if not self._delete_files(self.leases.gallery):
                    return False
        if self.leases.gallery is not None:
            self.leases.gallery.check()
        return self._finish()

    def _refresh(self) -> bool:
        """Read what others have done meanwhile; False if the erasure is complete."""
        return pending.update_progress(self.gallery, self.erasure)

    def _is_done(self, part: str) -> bool:
        return part in self.erasure.done or (self._refresh() and part in self.erasure.done)

    def _save_progress(self, part: str, lease: Lease | None, *, is_done: bool = False) -> None:
        """Save what a part has done, unless another run may have taken its lease over and be further."""
        if lease is not None:
            lease.check()
        pending.save_progress(self.gallery, self.receipt, part, is_done=is_done)

    def _end_part(self, part: str, lease: Lease | None) -> None:
        self._save_progress(part, lease, is_done=True)
        self.erasure.done.add(part)

    @contextmanager
    def _measure(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            spent = self.advance.seconds.get(step, 0.0) + time.monotonic() - began
            self.advance.seconds[step] = round(spent, 3)

    # ---- rows

    def _remove_rows(self, lease: Lease) -> None:
        """Remove rows from the table.

        What the receipt says of it is saved before the commit, because nobody could tell afterwards.
        """
        lease.check()
        self._select_again()
        # From here on no run embeds the images again. Readers leave them out already.
        if self.receipt.suppressed:
            selected = self.erasure.selected
            suppressed.suppress_images(
                self.gallery, self.erasure.id, selected.uris.to_pylist(), selected.contents.to_pylist()
            )
        uris = self.erasure.selected.uris.to_pylist()

        # The commit may call this again if another one came first, so it plans from the newest table each time.
        def rewrite() -> list[Action]:
            table = Gallery(self.gallery)
            trace = RewriteTrace()
            plan = plan_rewrite_of_uris(uris, lambda rows, mask: rows.filter(pc.invert(mask)))
            # What was replaced or relabelled may be on disk still, and goes as well.
            plan = replace(plan, deletes=True, purges=self._find_deleted)
            if self.erasure.purge_days > 0:
                # Hide the rows at once. The files that hold them are written anew within some days.
                plan = replace(plan, defers=True, keeps=_keep_none)
            actions = list(rewrite_files(table, plan, trace))
            if actions:
                self.receipt.version_before = table.version
                self.receipt.version_after = table.version + 1
                held = [*trace.before, *trace.hidden]
                self.receipt.files_before |= {name: digest or "" for name, digest in held}
                self.receipt.files_after |= {name: digest or "" for name, digest in trace.after}
            self._save_progress(ROWS, lease)
            return actions

        committer = self.leases.committer or Committer(Gallery(self.gallery), new_run_id(), lease)
        figures = {"images": self.receipt.images, "faces": self.receipt.faces}
        committer.commit_actions(rewrite, {"job": "erase", **figures})
        self._end_part(ROWS, lease)

    def _find_deleted(self, rows: pa.Table) -> pa.BooleanArray:
        """Find deleted rows of the erased, also under names and contents that they had before."""
        selected = self.erasure.selected
        uris = pa.concat_arrays([selected.uris, selected.former_uris])
        is_erased = pc.is_in(rows["uri"], uris)
        for column, values in (("image_id", selected.contents), ("identity", selected.names)):
            is_erased = pc.or_(is_erased, pc.and_(pc.is_valid(rows[column]), pc.is_in(rows[column], values)))
        return is_erased

    def _select_again(self) -> None:
        """Take in what the table has got of the images since they were selected.

        The erasure may have been recorded while another run was writing. Its rows were not in the table then.
        """
        table = Gallery(self.gallery)
        if table.version == self.erasure.selected.version:
            return
        erasure = self.erasure
        selected = select_again(table, erasure.selection, erasure.requested, erasure.selected)
        total = max(count_rows(table), selected.rows)
        if selected.rows > erasure.selected.rows and is_beyond(selected.rows, total, erasure.share):
            # Labels that changed by mistake at the source, for example. What was selected goes, with its copies.
            self.advance.doubts.append(
                f"the erasure {erasure.id} was recorded for {erasure.selected.images} images, and by now "
                f"{selected.images} meet its conditions, more than {erasure.share:.0%} of the gallery: those that came "
                "later stay. If they have to go as well, erase again"
            )
            selected = select_again(table, None, erasure.requested, erasure.selected)
        erasure.selected = selected
        set_counts(self.receipt, erasure.selected)
        pending.write_pending(self.gallery, erasure, must_exist=True)

    # ---- index

    def _remove_vectors(self, lease: Lease) -> None:
        if not manifests.exists(self.gallery):
            manifests.sweep(self.gallery, lease)  # parts of an index that was never finished
            self._end_part(INDEX, lease)
            return
        # Tombstones hide the vectors from other readers of the index as well; then their shards are rewritten.
        removal = vectors.hide_vectors(self.gallery, self.erasure.selected, lease)
        # A repeated step may find less than the first attempt did, so the larger count stays.
        self.receipt.vectors = max(self.receipt.vectors, removal.vectors)
        self.receipt.index_before = self.receipt.index_before | removal.before
        self._save_progress(INDEX, lease)

        def save_progress() -> None:
            self.receipt.index_after |= removal.after
            self._save_progress(INDEX, lease)

        # If no row had to be removed, the table has no new version for which the index could answer.
        version_before = self.receipt.version_before
        has_new_version = self.receipt.version_after > version_before
        if manifests.exists(self.gallery):
            vectors.remove_vectors(
                self.gallery,
                removal,
                version_before=version_before,
                version_after=self.receipt.version_after if has_new_version else version_before,
                lease=lease,
                before_publishing=save_progress,
            )
        else:
            manifests.sweep(self.gallery, lease)  # it was withdrawn
        if removal.dropped:
            self.progress(
                f"damaged, and no longer part of the index: {', '.join(removal.dropped)}; "
                f"`facepipe index {self.gallery}` adds their faces again"
            )
        if self.held.index is None:  # a job that holds it works with its copies
            lease.check()
            delete_copies(self.gallery, manifests.FOLDER)
        self._end_part(INDEX, lease)

    # ---- reports

    def _clean_reports(self, update_clusters: Callable[[], None] | None) -> None:
        folder = storage.join(self.gallery, REPORTS_FOLDER)
        names = list(storage.list_names(folder))
        if not names:
            self._end_part(REPORTS, None)
            return
        # Update the clusters before the lease is held, because the update holds it itself.
        has_clusters = any(name.split("/")[0] == "cluster" for name in names)
        if has_clusters and update_clusters is not None and self.leases.reports is None:
            try:
                update_clusters()
            except GalleryBusyError:
                return
        with ExitStack() as stack:
            lease = self.leases.reports or stack.enter_context(try_lease(folder, "reports", self.progress))
            if lease is None:
                return
            known_foreign = len(self.advance.foreign)
            for changed in self._iterate_scrubbed(folder, names, self._describe_erased(), lease):
                # Save the receipt after each file, so that a crash loses no name of a changed file.
                self.receipt.reports = sorted({*self.receipt.reports, changed})
                self._save_progress(REPORTS, lease)
                lease.check()
            self.receipt.foreign = len(self.advance.foreign) - known_foreign
            if self.held.reports is None:
                lease.check()
                delete_copies(self.gallery, REPORTS_FOLDER)
            self._end_part(REPORTS, lease)

    def _describe_erased(self) -> ErasedData:
        """Describe what reports must not hold; a label that other images still have may stay."""
        # The rows are gone by now: a name that still has rows belongs to images that stay.
        selected = self.erasure.selected
        faces = np.union1d(selected.faces.to_numpy(), self.erasure.indexed)
        # Reports also hold names that people gave.
        names = {*selected.names.to_pylist(), *find_lost_names(self.gallery, faces), *self._list_meant_names()}
        names_in_use = self._find_names_in_use(pa.array(sorted(names), pa.string()))
        return ErasedData(
            uris=frozenset([*selected.uris.to_pylist(), *filter(None, selected.former_uris.to_pylist())]),
            names=frozenset(names) - names_in_use,
            contents=frozenset(selected.contents.to_pylist()),
            faces=faces,
            marks=np.unique(selected.marks.to_numpy()),
        )

    def _list_meant_names(self) -> frozenset[str]:
        """List the names by which the images were chosen: somebody is erased as a person, and not only some photos."""
        selection = self.erasure.selection
        if selection is None or selection.list_conditions() != ["identities"]:
            return frozenset()
        return frozenset(filter(None, map(format_label, selection.identities)))

    def _find_names_in_use(self, names: pa.Array) -> frozenset[str]:
        """Find the labels among some names that images of the gallery have."""
        in_use: set[str] = set()
        if len(names):
            has_name = ds.field("identity").isin(names)
            for batch in Gallery(self.gallery).batches(["identity"], has_name, rows=_BATCH_ROWS):
                in_use.update(pc.unique(batch["identity"]).to_pylist())
        return frozenset(in_use)

    def _iterate_scrubbed(self, folder: str, names: list[str], erased: ErasedData, lease: Lease) -> Iterator[str]:
        """Remove erased data from all reports, and yield the name of each file that changed."""
        if open_store(self.gallery, REPORTS_FOLDER).is_complete:
            yield from scrub_reports(folder, erased, self._note_foreign, lease.renew)
            return
        self._delete_uploads(lambda: delete_report_uploads(folder, lease))
        for name in sorted({name.split("/")[0] for name in names if "/" in name}):
            yield from self._scrub_remote_report(name, erased, lease)
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
                self.advance.foreign.append(url)

    def _note_foreign(self, name: str) -> None:
        path = storage.join(self.gallery, REPORTS_FOLDER, name)
        if path not in self.advance.foreign:
            self.advance.foreign.append(path)

    def _scrub_remote_report(self, name: str, erased: ErasedData, lease: Lease) -> list[str]:
        """Fetch one report of a gallery in an object store, clean it, and upload it if it has changed."""
        store = open_store(self.gallery, f"{REPORTS_FOLDER}/{name}")
        report = get_report_name(name)
        # A disposable report is deleted as a whole, without fetching it.
        if is_disposable(name) and report is not None and is_our_listing(report, list(storage.list_names(store.url))):
            others = delete_owned(store.url, lambda inner: owns_file(report, inner), lease.check)
            delete_copies(self.gallery, f"{REPORTS_FOLDER}/{name}")
            if not others:
                return [f"{name}/"]
        # A run that was stopped may have cleaned this machine's copies only, which would then seem to be clean here.
        delete_copies(self.gallery, f"{REPORTS_FOLDER}/{name}")
        store = open_store(self.gallery, f"{REPORTS_FOLDER}/{name}")
        store.pull()
        changed = list(
            scrub_report(store.folder, erased, lambda inner: self._note_foreign(f"{name}/{inner}"), lease.renew)
        )
        if changed:
            store.push(last="report.html", before_each=lease.check)
        return [f"{name}/{inner}" for inner in changed]

    # ---- decisions

    def _clean_decisions(self) -> None:
        """Delete what people have decided about the erased."""
        erased = self._describe_erased()
        # Somebody who is chosen by name, and has no image left, is erased as a person.
        chosen = self._list_meant_names()
        in_use = self._find_names_in_use(pa.array(sorted(chosen), pa.string()))

        def note(count: int) -> None:
            # A repeated step finds less than the first attempt did, so the larger count stays.
            self.receipt.decisions = max(self.receipt.decisions, count)
            self._save_progress(DECISIONS, None)

        person = ErasedPerson(
            faces=erased.faces,
            contents=erased.contents,
            texts=erased.uris | erased.contents | frozenset(map(str, erased.faces.tolist())),
            names=erased.names,
            meant_names=chosen - in_use,
        )
        try:
            scrub_decisions(self.gallery, person, note)
        except GalleryBusyError:
            return
        self._end_part(DECISIONS, None)

    # ---- files and receipt

    def _delete_files(self, lease: Lease) -> bool:
        """Delete files that no longer belong to the table, its older log, and this machine's copies.

        Returns:
            False if finished blocks of the running job may still hold erased images: they are committed soon.
        """
        committer = self.leases.committer
        with ExitStack() as stack:
            if committer is not None:
                # Rewrites of the running job that are not committed yet would look like old files.
                stack.enter_context(committer.exclude_commits())
            unreferenced = claim_unreferenced(self.gallery, lease)
            self._delete_uploads(lambda: delete_uploads(self.gallery, lease))
            table = Gallery(self.gallery)
            if committer is not None:
                # Parts of the job are not committed yet, unless this erasure has taken them out of the table.
                in_work = [entry for entry in unreferenced if self._is_in_work(entry.url, committer)]
                if self.held.awaits_blocks and any(self._holds_erased(entry.url) for entry in in_work):
                    return False
                unreferenced = [entry for entry in unreferenced if entry not in in_work]
            # Count and save before deleting, because a repeated step finds nothing to count.
            self.receipt.files_deleted = max(self.receipt.files_deleted, len(unreferenced))
            self._save_progress(FILES, lease)
            delete_files(unreferenced, lease)
            self.receipt.log_files_deleted += delete_history(table, lease)
        # After a power cut nothing of it comes back: the receipt would say what is not so.
        self._sync_disks()
        self._end_part(FILES, lease)
        return True

    def _delete_uploads(self, delete: Callable[[], int]) -> None:
        """Delete uploads that never ended, and say so if the store cannot be asked for them."""
        try:
            delete()
        except UploadsUnknownError as error:
            self.progress(f"{error}. A lifecycle rule of the bucket deletes them (docs/operations.md)")

    def _sync_disks(self) -> None:
        """Have what was changed and deleted stay so, on every disk that holds a part of the gallery or a copy."""
        names = ("faces", manifests.FOLDER, REPORTS_FOLDER, decision_table.FOLDER)
        folders = [self.gallery, *(storage.join(self.gallery, name) for name in names)]
        storage.sync_disks(*([get_cache_folder()] if storage.is_remote(self.gallery) else folders))

    def _is_in_work(self, url: str, committer: Committer) -> bool:
        name = os.path.basename(url)
        return name.startswith(committer.part_prefix) and name not in self.receipt.files_before

    def _holds_erased(self, url: str) -> bool:
        """Tell whether a finished block that is not committed yet holds an erased image."""
        with storage.open_seekable(url) as handle:
            uris = pq.ParquetFile(handle).read(["uri"])["uri"]
        return bool(pc.any(pc.is_in(uris, self.erasure.selected.uris)).as_py())

    def _forget_replaced_files(self, table: Gallery) -> None:
        """Name in the receipt only files that are still there: some may have been replaced once more since."""
        current_files = set(table.list_paths())
        receipt = self.receipt
        receipt.files_after = {name: digest for name, digest in receipt.files_after.items() if name in current_files}
        if manifests.exists(self.gallery):
            shards = {entry.name for entry in manifests.load(self.gallery).shards}
            receipt.index_after = {
                name: digest for name, digest in receipt.index_after.items() if name.split("/")[0] in shards
            }

    def _finish(self) -> bool:
        """Write the receipt, and forget the names. Returns whether the erasure is complete."""
        # A run that was going on might have brought such images, and has brought none.
        if not self.receipt.images:
            pending.delete_pending(self.gallery, self.receipt)
            suppressed.release_images(self.gallery, self.erasure.id)
            return True
        table = Gallery(self.gallery)
        self._forget_replaced_files(table)
        # What is hidden and still on disk must not be forgotten, so it is recorded before the receipt is written.
        if self.erasure.purge_days > 0:
            purge = plan_purge(table, self.receipt, self.erasure.purge_days)
            if purge is not None:
                record_purge(self.gallery, purge)
                self.receipt.purge_due = purge.due.isoformat(timespec="seconds")
        try:
            self.receipt.hashes = hash_selected(self.receipt, self.erasure.selected)
            path = save_receipt(self.gallery, self.receipt)
        except ConfigError as error:
            # Nothing is left of the images. The receipt needs the key of the command that recorded the erasure.
            self.advance.keyless[self.erasure.id] = str(error)
            return False
        self.advance.receipts.append(path)
        pending.delete_pending(self.gallery, self.receipt)
        return True


def _keep_none(rows: pa.Table) -> pa.BooleanArray:
    """Tell that none of the rows that an erasure concerns is kept."""
    return pa.array(np.zeros(rows.num_rows, bool))


def set_counts(receipt: Receipt, selected: SelectedImages) -> None:
    """Have a receipt count what is selected."""
    receipt.images = selected.images
    receipt.faces = len(selected.faces)
    receipt.rows = selected.rows


def hash_selected(receipt: Receipt, selected: SelectedImages) -> dict[str, Any]:
    """Hash what is selected under the receipt's salt: the receipt names nobody."""
    return {
        "uris": receipt.hash_values(selected.uris.to_pylist()),
        "images": receipt.hash_values(selected.contents.to_pylist()),
        "faces": receipt.hash_values(map(str, selected.faces.to_pylist())),
    }
