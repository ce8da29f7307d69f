"""erase: delete images from a gallery, in steps that a crash cannot leave half done, and write a receipt."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from zipfile import BadZipFile

import numpy as np

from facepipe import storage
from facepipe.decisions.erase import find_confirmed_faces, scrub_names
from facepipe.erasure import pending, steps
from facepipe.erasure.clock import ErasableImages, select_erasable
from facepipe.erasure.limits import (
    ErasureLimit,
    check_limit,
    choose_limit,
    choose_repeat_limit,
    choose_total_share,
    explain_excess,
)
from facepipe.erasure.pending import PendingErasure
from facepipe.erasure.purges import MOST_DAYS, Purge, choose_due, do_purges, format_due, list_purges
from facepipe.erasure.receipt import Receipt, get_receipt_path, load_receipt
from facepipe.erasure.repeat import RepeatedErasure, keep_out, select_repeated
from facepipe.erasure.requests import find_indexed_faces, record_request
from facepipe.erasure.selection import Selection, explain_unmatched, read_time
from facepipe.erasure.trainings import find_left_faces, list_trainings
from facepipe.errors import ConfigError, ErasureLimitError, FacepipeError, GalleryBusyError, StorageError
from facepipe.gallery import Gallery, suppressed
from facepipe.gallery.migration import delete_leftovers, list_surplus, locate_migration
from facepipe.storage.lease import hold_lease, is_held
from pipelines.cluster import assign as cluster_assign
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls

Progress = Callable[[str], None]
MAX_NAMED = 1000
"""Images that a dry run names at most."""
_MIN_POLL_SECONDS = 0.25
_MAX_POLL_SECONDS = 5.0


@dataclass
class EraseSummary:
    """What was erased, or would be (dry run).

    Attributes:
        images: images that were deleted.
        faces: faces that were deleted.
        rows: rows that were deleted.
        dry_run: nothing was deleted; the counts say what would be.
        request: id of the request; empty if nothing was selected.
        purges: by when hidden rows leave the disk, by the id of the erasure.
        purged: files of the table that were written anew because the time of hidden rows was over.
        complete: whether everything is deleted. If not, the images are recorded and hidden, and a running job or the
            next erase deletes them.
        receipts: paths of receipts, those of earlier erasures that were completed as well.
        doubts: why images that this machine's clock takes for old enough were not erased.
        refusal: in a dry run, why more than may be erased without asking would be erased.
        foreign: files below reports/ that facepipe did not write and that hold erased data. They are left as they are.
        chips: files of training chips that hold erased faces, in folders that trainings on the gallery have recorded.
        trained: folders' lists of faces that a model was trained on, if erased ones are among them.
        decisions: decisions about the erased faces and persons that were deleted.
        left_foreign: number of such files that were found when another run completed the erasure.
        unmatched: which names in the selection match nothing, with the nearest ones that the gallery holds.
        others: faces that were not meant: other faces in the photos of a person.
        copies: images that are exact copies of selected ones.
        uris: in a dry run, the first images that would be deleted.
        unknown: images of repeated receipts that the gallery does not hold. They are kept out.
        seconds: wall clock by step.
    """

    images: int = 0
    faces: int = 0
    rows: int = 0
    dry_run: bool = False
    request: str = ""
    purges: dict[str, str] = field(default_factory=dict)
    purged: int = 0
    complete: bool = True
    receipts: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    refusal: str = ""
    foreign: list[str] = field(default_factory=list)
    chips: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    decisions: int = 0
    left_foreign: int = 0
    unmatched: list[str] = field(default_factory=list)
    others: int = 0
    copies: int = 0
    uris: list[str] = field(default_factory=list)
    unknown: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def run(
    selection: Selection,
    gallery: str,
    *,
    dry_run: bool = False,
    may_return: bool = False,
    wait: bool = True,
    limit: ErasureLimit | None = None,
    purge_days: float = 0.0,
    progress: Progress = lambda line: None,
) -> EraseSummary:
    """Erase images: rows, vectors, thumbnails, report entries, old files, and the table's older log.

    The erasure is recorded first, and no reader returns the images from then on. If other runs are writing to the
    gallery, they delete what this run cannot. Earlier erasures that are not complete are continued as well.

    Args:
        selection: the images.
        gallery: folder or URL of the gallery.
        dry_run: count only, and write nothing, not even a record of the run.
        may_return: let a later `embed` take the images in again.
        wait: return only when everything is deleted. Else return when all is done that can be done now.
        limit: how much may be erased; by default what `choose_limit` says.
        purge_days: days that rows may stay on disk in large files, hidden from all readers; 0 if they go at once.
        progress: called with a line per step.

    Raises:
        ConfigError: the selection is empty or invalid, or the days are too many.
        ErasureLimitError: more images are selected than may be erased without asking.
    """
    table = Gallery(gallery)
    if not 0 <= purge_days <= MOST_DAYS:
        raise ConfigError(f"--purge-days {purge_days:g} is not between 0 and {MOST_DAYS:g} days")
    limit = limit or choose_limit(selection)
    selection.build_filter(read_time())  # refuse an empty selection before anything is done
    # Faces that people say are the person go as well, whatever the source calls them.
    selection = replace(selection, confirmed=tuple(find_confirmed_faces(table, selection.identities).tolist()))
    if dry_run:
        chosen = select_erasable(table, selection, limit, writes=False)
        selected = chosen.images
        summary = EraseSummary(dry_run=True)
        _count_selected(table, selection, chosen, summary)
        summary.uris = selected.uris.slice(0, MAX_NAMED).to_pylist()
        summary.refusal = explain_excess(table, selected.images, selected.rows, limit)
        return summary
    return _erase(selection, table.path, limit, may_return, wait, purge_days, progress)


@record_calls("erase")
def _erase(
    selection: Selection,
    gallery: str,
    limit: ErasureLimit,
    may_return: bool,
    wait: bool,
    purge_days: float,
    progress: Progress,
) -> EraseSummary:
    summary = EraseSummary()
    attach_summary(summary)
    began = time.monotonic()
    # An erasure that a crash interrupted before readers were told is hidden now, and not selected again.
    pending.restore_list(gallery)
    suppressed.migrate_lists(gallery)
    pending.delete_leftovers(gallery)
    # The images of an interrupted erasure are hidden: who asks for them again matches nothing, and is not mistaken.
    is_repeated = any(erasure.selection == selection for erasure in pending.read_unfinished(gallery))
    table = Gallery(gallery)
    chosen = select_erasable(table, selection, limit)
    selected = chosen.images
    check_limit(table, selected, limit)
    _count_selected(table, selection, chosen, summary)
    erasure = None
    # A run that is going on may have blocks of such images that it has not committed yet.
    if selected.images or is_held(gallery):
        erasure = record_request(
            table,
            selection,
            selected,
            requested=chosen.time,
            may_return=may_return,
            share=choose_total_share(table, selected, limit),
            purge_days=purge_days,
        )
        summary.request = erasure.id
        find_indexed_faces(gallery, erasure)
        progress(f"{selected.images} images, {len(selected.faces)} faces: no search returns them any more")
    summary.seconds["hide"] = round(time.monotonic() - began, 3)
    # Another model's vectors of the images go first, so that the erasure is complete when this gallery's is.
    erase_surplus(gallery, selected.uris.to_pylist() if erasure else ())
    _advance(gallery, summary, [erasure.id] if erasure and wait else [], progress)
    # Decisions may name somebody of whom the gallery has no image.
    if not selected.images and selection.list_conditions() == ["identities"]:
        # Files of the version that was read above may be deleted by now.
        summary.decisions = scrub_names(Gallery(gallery), selection.identities)
        if summary.decisions:
            summary.unmatched = []
    if is_repeated and not selected.images:
        summary.unmatched = []
    if erasure:
        _note_completion(gallery, erasure, summary)
        _look_at_trainings(gallery, erasure, summary, progress)
    _purge_overdue(gallery, summary, progress)
    return summary


def _purge_overdue(gallery: str, summary: EraseSummary, progress: Progress) -> None:
    """Remove hidden rows whose time is over, unless another run is writing, and note which are left."""
    overdue = choose_due(list_purges(gallery), margin=False)
    try:
        summary.purged += _purge(gallery, overdue)
    except GalleryBusyError as error:
        progress(f"hidden rows whose time is over are still on disk: {error}")
    _note_purges(gallery, summary)


def _note_purges(gallery: str, summary: EraseSummary) -> None:
    summary.purges = {purge.id: format_due(purge.due) for purge in list_purges(gallery)}


def _purge(gallery: str, purges: list[Purge]) -> int:
    if not purges:
        return 0
    with hold_lease(gallery) as lease:
        return do_purges(gallery, purges, lease)


def purge(gallery: str) -> EraseSummary:
    """Remove all hidden rows of erasures from the disk, whether their time is over or not.

    Args:
        gallery: folder or URL of the gallery.

    Raises:
        GalleryBusyError: another run is writing to the gallery, or reading old files of it.
    """
    return _purge_all(Gallery(gallery).path)


@record_calls("erase")
def _purge_all(gallery: str) -> EraseSummary:
    summary = EraseSummary()
    attach_summary(summary)
    summary.purged = _purge(gallery, list_purges(gallery))
    _note_purges(gallery, summary)
    return summary


def _count_selected(table: Gallery, selection: Selection, chosen: ErasableImages, summary: EraseSummary) -> None:
    """Count what is selected, and note which names in the selection match nothing."""
    selected = chosen.images
    summary.images = selected.images
    summary.faces = len(selected.faces)
    summary.rows = selected.rows
    summary.others = selected.others
    summary.copies = selected.copies
    summary.doubts += chosen.doubts
    # Images that the clock keeps are an answer already.
    if selected.images or not chosen.doubts:
        summary.unmatched = explain_unmatched(table, selection, is_empty=not selected.images)


def repeat(
    receipts: Sequence[Receipt],
    gallery: str,
    *,
    dry_run: bool = False,
    wait: bool = True,
    limit: ErasureLimit | None = None,
    progress: Progress = lambda line: None,
) -> EraseSummary:
    """Repeat erasures by their receipts: in a gallery restored from a backup, or in another copy of it.

    Images of the receipts that the gallery does not hold are kept out of it.

    Args:
        receipts: the receipts, as `facepipe.erasure.repeat.read_receipts` returns them.
        gallery: folder or URL of the gallery.
        dry_run: count only, and write nothing.
        wait: return only when everything is deleted.
        limit: how much may be erased; by default what `choose_repeat_limit` says.
        progress: called with a line per step.

    Raises:
        ConfigError: a receipt needs a key that is not set.
        ErasureLimitError: more images are meant than may be erased without asking.
    """
    table = Gallery(gallery)
    limit = limit or choose_repeat_limit()
    if not dry_run:
        return _repeat(receipts, table.path, limit, wait, progress)
    summary = EraseSummary(dry_run=True)
    _count_repeated(summary, select_repeated(table, receipts))
    summary.refusal = explain_excess(table, summary.images, summary.rows, limit)
    return summary


@record_calls("erase")
def _repeat(
    receipts: Sequence[Receipt], gallery: str, limit: ErasureLimit, wait: bool, progress: Progress
) -> EraseSummary:
    summary = EraseSummary()
    attach_summary(summary)
    began = time.monotonic()
    pending.restore_list(gallery)
    suppressed.migrate_lists(gallery)
    table = Gallery(gallery)
    repeated = select_repeated(table, receipts)
    _count_repeated(summary, repeated)
    excess = explain_excess(table, summary.images, summary.rows, limit)
    if excess:
        raise ErasureLimitError(excess)
    erasures = []
    for erasure in repeated:
        if erasure.is_suppressed:
            summary.doubts += _keep_out(gallery, erasure)
        # A run that is going on may have blocks of such images that it has not committed yet.
        if erasure.selected.images or is_held(gallery):
            erasures.append(
                record_request(
                    table,
                    None,
                    erasure.selected,
                    requested=read_time(),
                    may_return=not erasure.is_suppressed,
                    repeats=[receipt.id for receipt in erasure.receipts],
                )
            )
            find_indexed_faces(gallery, erasures[-1])
    progress(f"{summary.images} images, {summary.faces} faces: no search returns them any more")
    summary.seconds["hide"] = round(time.monotonic() - began, 3)
    erase_surplus(gallery, [uri for erasure in repeated for uri in erasure.selected.uris.to_pylist()])
    _advance(gallery, summary, [erasure.id for erasure in erasures] if wait else [], progress)
    for recorded in erasures:
        _note_completion(gallery, recorded, summary)
    return summary


def _count_repeated(summary: EraseSummary, repeated: Sequence[RepeatedErasure]) -> None:
    for erasure in repeated:
        summary.images += erasure.selected.images
        summary.faces += len(erasure.selected.faces)
        summary.rows += erasure.selected.rows
        summary.unknown += erasure.unknown


def _keep_out(gallery: str, erasure: RepeatedErasure) -> list[str]:
    """Keep out what the gallery does not hold, and say for which receipts that cannot be done."""
    left = keep_out(gallery, erasure.receipts, erasure.selected)
    if not left:
        return []
    names = ", ".join(receipt.id for receipt in left)
    return [
        f"images of the receipts {names} that this gallery does not hold can come in again, because an older version "
        "wrote the receipts: copy ID.uris, ID.contents and salt from the erased/ folder of their gallery"
    ]


def erase_surplus(gallery: str, also: Sequence[str] = ()) -> int:
    """Erase from a migration of a gallery what the gallery has no more, or is erasing. It may come back.

    Args:
        gallery: folder or URL of the gallery.
        also: uris of images that a migration which is running must not commit.

    Returns:
        The number of images that the migration had.
    """
    second = locate_migration(gallery)
    delete_leftovers(gallery)
    if not Gallery.exists(second):
        return 0
    surplus = list_surplus(Gallery(gallery), Gallery(second))
    uris = tuple(dict.fromkeys([*surplus, *also]))
    if uris:
        run(Selection(images=uris), second, may_return=True, limit=ErasureLimit(share=1.0))
    return len(surplus)


def list_unfinished(gallery: str) -> list[str]:
    """List the ids of erasures that are recorded and not complete."""
    return [erasure.id for erasure in pending.read_unfinished(gallery)]


def resume(gallery: str, *, wait: bool = False, progress: Progress = lambda line: None) -> EraseSummary:
    """Continue erasures that are recorded and not complete, if there are any.

    Args:
        gallery: folder or URL of the gallery.
        wait: return only when all are complete.
        progress: called with a line per step.
    """
    summary = EraseSummary()
    path = Gallery(gallery).path
    pending.restore_list(path)
    suppressed.migrate_lists(path)
    pending.delete_leftovers(path)
    unfinished = pending.read_unfinished(path)
    if unfinished:
        erase_surplus(path)
    for erasure in unfinished:
        progress(f"continuing the erasure {erasure.id}")
    _advance(path, summary, [erasure.id for erasure in unfinished] if wait else [], progress)
    for erasure in unfinished:
        _note_completion(path, erasure, summary)
        _look_at_trainings(path, erasure, summary, progress)
    _purge_overdue(path, summary, progress)
    return summary


def _advance(gallery: str, summary: EraseSummary, awaited: list[str], progress: Progress) -> None:
    """Do all steps that can be done now, again and again until some erasures are complete."""
    pause = _MIN_POLL_SECONDS
    is_announced = False
    began = time.monotonic()
    while True:
        result = steps.advance_erasures(
            gallery, progress=progress, update_clusters=lambda: _update_clusters(gallery, progress)
        )
        _add_result(summary, result)
        for request, reason in result.keyless.items():
            progress(f"all is deleted, but the receipt of the erasure {request} cannot be written yet: {reason}")
        # Waiting brings no key.
        awaited = [request for request in awaited if request not in result.keyless]
        if not any(pending.is_pending(gallery, request) for request in awaited):
            break
        if not is_announced:
            progress(
                "another run is writing to the gallery, its index or its reports: it deletes the rest. No reader "
                "returns the images any more. You can stop waiting: the request stays recorded"
            )
            is_announced = True
        # What the other run does in between shows in the files of the request.
        time.sleep(pause)
        pause = min(_MAX_POLL_SECONDS, 1.2 * pause)
    if is_announced:
        summary.seconds["wait"] = round(time.monotonic() - began, 3)


def _add_result(summary: EraseSummary, result: steps.Advance) -> None:
    summary.receipts += result.receipts
    summary.doubts += result.doubts
    summary.foreign += [path for path in result.foreign if path not in summary.foreign]
    for step, seconds in result.seconds.items():
        summary.seconds[step] = round(summary.seconds.get(step, 0.0) + seconds, 3)


def _note_completion(gallery: str, erasure: PendingErasure, summary: EraseSummary) -> None:
    """Note in the summary whether an erasure is complete, also if another run has completed it."""
    if pending.is_pending(gallery, erasure.id):
        summary.complete = False
        return
    path = get_receipt_path(gallery, erasure.id)
    if path not in summary.receipts:
        if not storage.file_exists(path):
            return  # nothing was erased
        summary.receipts.append(path)
    receipt = load_receipt(path)
    if not summary.foreign:
        summary.left_foreign += receipt.foreign
    if erasure.id == summary.request:
        summary.images = receipt.images
        summary.faces = receipt.faces
        summary.rows = receipt.rows
        summary.decisions = receipt.decisions
    run = get_current_run()
    if run is not None:
        run.add_count("erased_images", receipt.images)


def _look_at_trainings(gallery: str, erasure: PendingErasure, summary: EraseSummary, progress: Progress) -> None:
    """Note what trainings keep of the erased faces in folders of their own."""
    faces = np.union1d(erasure.selected.faces.to_numpy(), erasure.indexed)
    for training in list_trainings(gallery):
        if not training.is_here:
            progress(f"not looked at: {training.path} on {training.host}, which may hold chips of erased faces")
            continue
        try:
            left = list(find_left_faces(training.path, faces))
        except StorageError as error:
            progress(str(error))
            continue
        for file in left:
            noted = summary.chips if file.are_chips else summary.trained
            if file.path not in noted:
                noted.append(file.path)
                progress(str(file))


def _update_clusters(gallery: str, progress: Progress) -> None:
    """Update the clusters, if that can be done; what cleans reports only removes what belongs to the erased alone."""
    try:
        cluster_assign.run(gallery, progress=progress)
    except GalleryBusyError:
        raise
    except (FacepipeError, OSError, ValueError, KeyError, BadZipFile) as error:
        progress(f"the clusters could not be updated ({type(error).__name__})")
