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
from facepipe.erasure.gone import ANY, Gone
from facepipe.erasure.lists import scrub_csv, scrub_list
from facepipe.erasure.pages import scrub_page
from facepipe.erasure.tables import orphans, scrub_arrays, scrub_table
from facepipe.errors import StorageError
from facepipe.storage import describe_error
from facepipe.storage.lease import LEASE_FILE
from facepipe.storage.store import PRIVATE_NAMES

_WORDS = re.compile(rb"[^\s\"'<>,;\x00]+")
_DAMAGED = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile, csv.Error)


def doomed(name: str) -> bool:
    """Whether a folder is nothing but vectors, or pieces of reports: it is deleted, and made anew when it is needed."""
    return name == "graph" or name.endswith((".partial", ".old"))


def scrub(folder: str, gone: Gone) -> Iterator[str]:
    """Take the erased out of all reports below a folder; names of files, each after it was changed or deleted."""
    here = _Report(folder, gone)
    for name in sorted(os.listdir(folder), key=_last_tables) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if os.path.isdir(path) and doomed(name):
            shutil.rmtree(path)
            yield f"{name}/"
        elif os.path.isdir(path):
            yield from (f"{name}/{inner}" for inner in scrub(path, gone))
        elif name.endswith(".new") and not name.startswith(LEASE_FILE):
            _unlink(path)  # of a run that died
        elif not name.startswith(LEASE_FILE) and name not in PRIVATE_NAMES and here.scrub(name):
            yield name
    if _forgot(folder):
        yield SUMS


def _last_tables(name: str) -> tuple[bool, bool, str]:
    """Lists are read with the help of others: paths without their root need clean.txt, and all need the tables."""
    return name.endswith(".parquet"), name == "clean.txt", name


def _forgot(folder: str) -> bool:
    """Whether sums of clusters were others' than of the faces that are left: the difference is who was erased."""
    if not os.path.exists(os.path.join(folder, SUMS)):
        return False
    try:
        counts = AssignmentTable(os.path.join(folder, FACES)).count_faces()
        sums = ClusterSums.load(folder, counts)
    except (StorageError, *_DAMAGED):
        for name in (SUMS, MARK):
            _unlink(os.path.join(folder, name))
        return True
    if sums is not None and not len(sums.stale):
        return False
    clear_stale_sums(folder, counts)
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {describe_error(error)}") from error


class _Report:
    """The files of one report."""

    def __init__(self, folder: str, gone: Gone):
        self._folder, self._gone = folder, gone

    @cached_property
    def _listed(self) -> Gone:
        """What must not be in lists and pages: images that were to go for a copy that is erased are wanted again."""
        path = os.path.join(self._folder, "decisions.parquet")
        try:
            wanted = list(orphans(path, self._gone))
        except (OSError, *_DAMAGED):  # it is no table of copies, or is deleted below
            wanted = []
        return replace(self._gone, uris=self._gone.uris.union(*wanted))

    def scrub(self, name: str) -> bool:
        """Whether the file was changed or deleted. One that is damaged goes: whatever is in it, it is not left."""
        path, kind = os.path.join(self._folder, name), os.path.splitext(name)[1]
        if name == SUMS:
            return False  # with the tables
        tables: dict[str, Callable[[str, Gone], bool]] = {
            ".parquet": scrub_table,
            ".npz": scrub_arrays,
            ".json": _json_file,
        }
        lists: dict[str, Callable[[str, Gone], bool]] = {".txt": scrub_list, ".csv": scrub_csv, ".html": scrub_page}
        try:
            if kind in lists:
                return lists[kind](path, self._listed)
            return tables.get(kind, _unknown)(path, self._gone)
        except OSError as error:
            if error.errno is not None:  # Arrow's own have none
                raise StorageError(f"cannot clean the report {path!r}: {describe_error(error)}") from error
        except _DAMAGED:
            pass
        for left in (path, path + ".new"):
            _unlink(left)
        return True


def _json_file(path: str, gone: Gone) -> bool:
    """A file that says one of the names goes."""
    with open(path, encoding="utf-8") as file:
        if gone.by_role[ANY].isdisjoint(_strings(json.load(file))):
            return False
    os.unlink(path)
    return True


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        value = list(value.values())
    for inner in value if isinstance(value, list) else ():
        yield from _strings(inner)


def _unknown(path: str, gone: Gone) -> bool:
    """A file of no known kind, which is none of ours, goes where a uri or a name stands in it as a word or as words."""
    texts = {text.encode("utf-8", "surrogateescape") for text in gone.uris | gone.names}
    with open(path, "rb") as file:
        data = file.read()
    if texts.isdisjoint(_WORDS.findall(data)) and not any(text in data for text in texts if not _WORDS.fullmatch(text)):
        return False
    os.unlink(path)
    return True
