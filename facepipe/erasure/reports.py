"""Reports without erased data, file by file. A file that cannot be cleaned is deleted."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any
from zipfile import BadZipFile

import pyarrow as pa

from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.sums import MARK, SUMS, ClusterSums, clear_stale_sums
from facepipe.curation.clusters.tables import FACES
from facepipe.erasure.erased_data import ANY, ErasedData
from facepipe.erasure.lists import scrub_csv, scrub_list
from facepipe.erasure.pages import scrub_page
from facepipe.erasure.tables import find_copies_of_erased, scrub_arrays, scrub_table
from facepipe.errors import StorageError
from facepipe.storage import describe_error
from facepipe.storage.lease import LEASE_FILE
from facepipe.storage.store import PRIVATE_NAMES

_WORDS = re.compile(rb"[^\s\"'<>,;\x00]+")
# What reading a damaged file, or one of another format, may raise.
_DAMAGED = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile, csv.Error)

Scrubber = Callable[[str, ErasedData], bool]  # cleans one file; returns whether it was changed or deleted


def is_disposable(name: str) -> bool:
    """Tell whether a folder holds only vectors or parts of reports, which the next report makes again."""
    return name == "graph" or name.endswith((".partial", ".old"))


def scrub_reports(folder: str, erased: ErasedData) -> Iterator[str]:
    """Remove erased data from all reports below a folder.

    Returns:
        Names of files and folders, each after it was changed or deleted.

    Raises:
        StorageError: a file cannot be read, written or deleted.
    """
    # Files in order, so that those which help to read others are cleaned last.
    report = _ReportFolder(folder, erased)
    names = sorted(os.listdir(folder), key=_sort_key) if os.path.isdir(folder) else []
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and is_disposable(name):
            shutil.rmtree(path)
            yield f"{name}/"
        elif os.path.isdir(path):
            yield from (f"{name}/{inner}" for inner in scrub_reports(path, erased))
        elif name.startswith(LEASE_FILE):
            continue
        elif name.endswith(".new"):
            # Unfinished files may hold erased data, and nobody reads them.
            _delete_file(path)  # left by a run that was killed
        elif name not in PRIVATE_NAMES and report.scrub_file(name):
            yield name
    # The sums come after the tables, because they are checked against them.
    if _update_sums(folder):
        yield SUMS


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


class _ReportFolder:
    """The files of one report."""

    def __init__(self, folder: str, erased: ErasedData) -> None:
        self._folder = folder
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

        A damaged file is deleted, whatever it holds.
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
            return table_scrubbers.get(extension, _scrub_unknown)(path, self._erased)
        except OSError as error:
            if error.errno is not None:  # Arrow raises errors without a number for damaged files
                raise StorageError(f"cannot clean the report {path!r}: {describe_error(error)}") from error
        except _DAMAGED:
            pass
        # A damaged file cannot be searched, so it goes.
        for left_over in (path, path + ".new"):
            _delete_file(left_over)
        return True


def _scrub_json(path: str, erased: ErasedData) -> bool:
    """Delete a JSON file that holds one of the names."""
    with open(path, encoding="utf-8") as file:
        if erased.by_role[ANY].isdisjoint(_iterate_strings(json.load(file))):
            return False
    os.unlink(path)
    return True


def _iterate_strings(value: Any) -> Iterator[str]:
    """Iterate over all strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_strings(item)
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _iterate_strings(item)


def _scrub_unknown(path: str, erased: ErasedData) -> bool:
    """Delete a file of an unknown kind that contains a uri or a name as a word or words."""
    # Single words are looked up in a set; only texts of several words need a search each.
    texts = {text.encode("utf-8", "surrogateescape") for text in erased.uris | erased.names}
    phrases = [text for text in texts if not _WORDS.fullmatch(text)]
    with open(path, "rb") as file:
        data = file.read()
    if texts.isdisjoint(_WORDS.findall(data)) and not any(phrase in data for phrase in phrases):
        return False
    os.unlink(path)
    return True
