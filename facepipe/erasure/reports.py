"""Reports without erased data, file by file. A file of ours that cannot be cleaned is deleted.

Files of others below the reports are searched and named. They are never changed, whatever they hold.

A run may be paused anywhere, for hours, and another one may make or clean the same report when it goes on. So a report
is cleaned as a copy, which takes its place in one step. A run that begins deletes the copies of earlier ones first.
"""

import csv
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from zipfile import BadZipFile

import pyarrow as pa

from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.sums import MARK, SUMS, ClusterSums, clear_stale_sums
from facepipe.curation.clusters.tables import FACES
from facepipe.curation.report_folders import (
    MARKER,
    PREVIOUS,
    ReportFolder,
    delete_report,
    get_report_name,
    inspect_folder,
    is_disposable,
    replace_report,
)
from facepipe.erasure.erased_data import ANY, ErasedData
from facepipe.erasure.foreign import OnForeign, find_foreign, iterate_strings
from facepipe.erasure.lists import scrub_csv, scrub_list
from facepipe.erasure.pages import scrub_page
from facepipe.erasure.tables import find_copies_of_erased, scrub_arrays, scrub_table
from facepipe.errors import StorageError
from facepipe.storage import describe_error, list_names, sync_folder
from facepipe.storage.atomic import UNFINISHED, swap_folders
from facepipe.storage.lease import LEASE_FILE
from facepipe.storage.owned import walk_files
from facepipe.storage.store import PRIVATE_NAMES

# What reading a damaged file, or one of another format, may raise.
_DAMAGED = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile, csv.Error)

Scrubber = Callable[[str, ErasedData], bool]  # cleans one file; returns whether it was changed or deleted
Claim = Callable[[], object]
"""Proves that nobody else cleans or makes reports, or raises. It is called right before a report is replaced."""


def scrub_reports(folder: str, erased: ErasedData, on_foreign: OnForeign, claim: Claim = lambda: None) -> Iterator[str]:
    """Remove erased data from all reports below a local folder.

    Only reports of facepipe are touched. Links are not followed.

    Args:
        folder: the folder of the reports.
        erased: what must not be left.
        on_foreign: called with the name of each file that facepipe did not write and that holds erased data.
        claim: called right before something is replaced or deleted.

    Returns:
        Names of files and folders that are changed or deleted. The changes of a report take effect when all of its
        names are returned.

    Raises:
        StorageError: a file cannot be read, written or deleted.
    """
    # Copies that earlier runs work on go first, so that none of them takes the place of a report any more.
    for name in sorted(list_names(folder), key=lambda name: (not is_disposable(name), name)):
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            changed = scrub_report(path, erased, lambda inner, name=name: on_foreign(f"{name}/{inner}"), claim)  # type: ignore[misc]
            yield from (f"{name}/{inner}" for inner in changed)
        elif not name.startswith(LEASE_FILE) and name not in PRIVATE_NAMES:
            find_foreign(folder, [name], erased, on_foreign)


def scrub_report(folder: str, erased: ErasedData, on_foreign: OnForeign, claim: Claim = lambda: None) -> Iterator[str]:
    """Remove erased data from one folder below the reports, as `scrub_reports` does."""
    content = inspect_folder(folder)
    if content is None:
        # The folder of somebody else: its files are read, and never changed.
        find_foreign(folder, (name for name, is_folder in walk_files(folder) if not is_folder), erased, on_foreign)
        return
    if is_disposable(os.path.basename(folder)):
        yield ""
        claim()
        _delete_disposable(content)
    else:
        yield from _scrub_copy(content, erased, claim)
    find_foreign(folder, content.others, erased, on_foreign)


def _delete_disposable(content: ReportFolder) -> None:
    """Delete a graph, or a folder in which a report was made or cleaned."""
    if get_report_name(os.path.basename(content.path)) != os.path.basename(content.path):
        delete_report(content.path, content.report)
        return
    # Others may make a new graph while this run is paused in the middle, so the old one is renamed first.
    outgoing = _name_copy(content.path)
    try:
        os.rename(content.path, outgoing)
        replace_report(outgoing, content.path, content.report)
    except OSError as error:
        raise StorageError(f"cannot delete {content.path!r}: {describe_error(error)}") from error


def _scrub_copy(content: ReportFolder, erased: ErasedData, claim: Claim) -> Iterator[str]:
    """Clean a copy of a report, and let it take the report's place if anything has changed in it."""
    copy = _name_copy(content.path)
    try:
        # Unfinished files may hold erased data, and nobody reads them: they are left out.
        names = [name for name in content.files if not name.endswith(UNFINISHED)]
        is_changed = len(names) < len(content.files)
        _link_files(content.path, names, copy)
        report = _ScrubbedCopy(copy, content.path, erased)
        # Files come in an order in which those that help to read others are cleaned last.
        for name in sorted(names, key=_sort_key):
            if name not in PRIVATE_NAMES and name != MARKER and report.scrub_file(name):
                is_changed = True
                yield name
        # The sums come after the tables, because they are checked against them.
        if SUMS in names and _update_sums(copy):
            is_changed = True
            yield SUMS
        if is_changed:
            claim()
            swap_folders(copy, content.path)
            sync_folder(os.path.dirname(content.path))
            replace_report(copy, content.path, content.report)
    except OSError as error:
        raise StorageError(f"cannot clean the report {content.path!r}: {describe_error(error)}") from error
    finally:
        delete_report(copy, content.report)


def _name_copy(folder: str) -> str:
    """Name a folder that is used once, and that the next run deletes."""
    return f"{folder}.{secrets.token_hex(8)}{PREVIOUS}"


def _link_files(folder: str, names: list[str], copy: str) -> None:
    """Link files of a folder into another one. Scrubbers replace files and change none in its place."""
    os.mkdir(copy)
    shutil.copystat(folder, copy)
    for name in names:
        path = os.path.join(copy, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            os.link(os.path.join(folder, name), path)
        except OSError:  # the file of another user, or a cache on a disk without links
            shutil.copy2(os.path.join(folder, name), path)


def _sort_key(name: str) -> tuple[bool, bool, str]:
    """Sort the files that help to read others last: tables help with all lists, clean.txt with short paths."""
    return name.endswith(".parquet"), name == "clean.txt", name


def _update_sums(folder: str) -> bool:
    """Clear sums of clusters that still count erased faces, and return whether there were any."""
    if not os.path.exists(os.path.join(folder, SUMS)):
        return False
    try:
        # Sums are stale if a cluster has fewer faces than they were made of.
        counts = AssignmentTable(os.path.join(folder, FACES)).count_faces()
        sums = ClusterSums.load(folder, counts)
    except (StorageError, *_DAMAGED):
        for name in (SUMS, MARK):
            _delete_file(os.path.join(folder, name))
        return True
    if sums is not None and not len(sums.stale):
        return False
    clear_stale_sums(folder, counts)
    return True


def _delete_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {describe_error(error)}") from error


class _ScrubbedCopy:
    """The files of a copy of a report."""

    def __init__(self, folder: str, original: str, erased: ErasedData) -> None:
        self._folder = folder
        self._original = original  # for messages
        self._erased = erased

    @cached_property
    def _unlisted(self) -> ErasedData:
        """What lists and pages must not show.

        That includes images that were to be dropped as copies of an erased one: they are kept now.
        """
        # Copies of an erased image are not duplicates any more, so lists must not drop them.
        path = os.path.join(self._folder, "decisions.parquet")
        try:
            copies = list(find_copies_of_erased(path, self._erased))
        except (OSError, *_DAMAGED):  # another kind of table, or damaged; `scrub_file` deletes a damaged one
            copies = []
        return replace(self._erased, uris=self._erased.uris.union(*copies))

    def scrub_file(self, name: str) -> bool:
        """Remove erased data from a file, and return whether it was changed or deleted.

        A damaged file is deleted, whatever it holds: it is ours, and the next report makes it again.
        """
        if name == SUMS:
            return False  # cleaned together with the tables
        path = os.path.join(self._folder, name)
        extension = os.path.splitext(name)[1]
        # Lists and pages also lose the copies; tables and arrays only the erased data.
        table_scrubbers: dict[str, Scrubber] = {".parquet": scrub_table, ".npz": scrub_arrays, ".json": _scrub_json}
        list_scrubbers: dict[str, Scrubber] = {".txt": scrub_list, ".csv": scrub_csv, ".html": scrub_page}
        try:
            if extension in list_scrubbers:
                return list_scrubbers[extension](path, self._unlisted)
            return table_scrubbers[extension](path, self._erased)
        except OSError as error:
            if error.errno is not None:  # Arrow raises errors without a number for damaged files
                original = os.path.join(self._original, name)
                raise StorageError(f"cannot clean the report {original!r}: {describe_error(error)}") from error
        except _DAMAGED:
            pass
        # A damaged file cannot be searched, so it goes.
        for left_over in (path, path + ".new"):
            _delete_file(left_over)
        return True


def _scrub_json(path: str, erased: ErasedData) -> bool:
    """Delete a JSON file that holds one of the names."""
    with open(path, encoding="utf-8") as file:
        if erased.by_role[ANY].isdisjoint(iterate_strings(json.load(file))):
            return False
    os.unlink(path)
    return True
