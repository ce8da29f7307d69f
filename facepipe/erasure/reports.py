"""Reports without the erased, file by file; what cannot be mended is deleted."""

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
_DAMAGED = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile, csv.Error)


def is_disposable(name: str) -> bool:
    """Whether a folder is nothing but vectors, or pieces of reports: it is deleted, and made anew when it is needed."""
    return name == "graph" or name.endswith((".partial", ".old"))


def scrub_reports(folder: str, gone: ErasedData) -> Iterator[str]:
    """Take the erased out of all reports below a folder; names of files, each after it was changed or deleted."""
    here = _ReportFolder(folder, gone)
    for name in sorted(os.listdir(folder), key=_sort_key) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if os.path.isdir(path) and is_disposable(name):
            shutil.rmtree(path)
            yield f"{name}/"
        elif os.path.isdir(path):
            yield from (f"{name}/{inner}" for inner in scrub_reports(path, gone))
        elif name.endswith(".new") and not name.startswith(LEASE_FILE):
            _delete_file(path)  # of a run that died
        elif not name.startswith(LEASE_FILE) and name not in PRIVATE_NAMES and here.scrub_file(name):
            yield name
    if _update_sums(folder):
        yield SUMS


def _sort_key(name: str) -> tuple[bool, bool, str]:
    """Lists are read with the help of others: paths without their root need clean.txt, and all need the tables."""
    return name.endswith(".parquet"), name == "clean.txt", name


def _update_sums(folder: str) -> bool:
    """Whether sums of clusters were others' than of the faces that are left: the difference is who was erased."""
    if not os.path.exists(os.path.join(folder, SUMS)):
        return False
    try:
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

    def __init__(self, folder: str, gone: ErasedData):
        self._folder, self._gone = folder, gone

    @cached_property
    def _unlisted(self) -> ErasedData:
        """What must not be in lists and pages: images that were to go for a copy that is erased are wanted again."""
        path = os.path.join(self._folder, "decisions.parquet")
        try:
            wanted = list(find_copies_of_erased(path, self._gone))
        except (OSError, *_DAMAGED):  # it is no table of copies, or is deleted below
            wanted = []
        return replace(self._gone, uris=self._gone.uris.union(*wanted))

    def scrub_file(self, name: str) -> bool:
        """Whether the file was changed or deleted. One that is damaged goes: whatever is in it, it is not left."""
        path, kind = os.path.join(self._folder, name), os.path.splitext(name)[1]
        if name == SUMS:
            return False  # with the tables
        tables: dict[str, Callable[[str, ErasedData], bool]] = {
            ".parquet": scrub_table,
            ".npz": scrub_arrays,
            ".json": _scrub_json,
        }
        lists: dict[str, Callable[[str, ErasedData], bool]] = {
            ".txt": scrub_list,
            ".csv": scrub_csv,
            ".html": scrub_page,
        }
        try:
            if kind in lists:
                return lists[kind](path, self._unlisted)
            return tables.get(kind, _scrub_unknown)(path, self._gone)
        except OSError as error:
            if error.errno is not None:  # Arrow's own have none
                raise StorageError(f"cannot clean the report {path!r}: {describe_error(error)}") from error
        except _DAMAGED:
            pass
        for left in (path, path + ".new"):
            _delete_file(left)
        return True


def _scrub_json(path: str, gone: ErasedData) -> bool:
    """A file that says one of the names goes."""
    with open(path, encoding="utf-8") as file:
        if gone.by_role[ANY].isdisjoint(_iterate_strings(json.load(file))):
            return False
    os.unlink(path)
    return True


def _iterate_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _iterate_strings(inner)


def _scrub_unknown(path: str, gone: ErasedData) -> bool:
    """A file of no known kind, which is none of ours, goes where a uri or a name stands in it as a word or as words."""
    texts = {text.encode("utf-8", "surrogateescape") for text in gone.uris | gone.names}
    with open(path, "rb") as file:
        data = file.read()
    if texts.isdisjoint(_WORDS.findall(data)) and not any(text in data for text in texts if not _WORDS.fullmatch(text)):
        return False
    os.unlink(path)
    return True
