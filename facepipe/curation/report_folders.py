"""Which folders below GALLERY/reports/ are reports, and which files in them are theirs.

People keep their own files there too: notes beside a report, folders of their own, links. facepipe deletes and replaces
its own files only. A folder is ours if its name is that of a report and it holds our marker. A file is ours if the
report has a file of that name.
"""

import json
import os
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import facepipe
from facepipe import storage
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.changes import ReadMark
from facepipe.provenance import format_date, get_command
from facepipe.storage.atomic import UNFINISHED
from facepipe.storage.inside import make_link_error
from facepipe.storage.lease import Lease
from facepipe.storage.owned import delete_owned_folder, walk_files
from facepipe.storage.store import PRIVATE_NAMES
from facepipe.storage.uploads import abort_uploads

MARKER = "facepipe.json"
"""The file that marks a folder as ours. It says which report the folder is for."""
GRAPH = "graph"

# Endings of the folders that a report is made in, and that hold the report before it while the two change places. The
# id of the run's lease stands before the ending, except in folders of older versions.
PARTIAL = ".partial"
PREVIOUS = ".old"
# Either ending; the id of a run may stand before it.
_WORK = re.compile(rf"(.+?)(?:\.[0-9a-f]+)?(?:{re.escape(PARTIAL)}|{re.escape(PREVIOUS)})")

_FORMAT = 1
_DUPLICATES = (
    "pairs.parquet",
    "groups.parquet",
    "decisions.parquet",
    "keep.txt",
    "drop.txt",
    "report.html",
    "mark.json",
    "decided.json",
)
# Files of the reports, by the reports' names. Tests compare them with what each command writes.
_REPORT_FILES: dict[str, tuple[str, ...]] = {
    "dedup": _DUPLICATES,
    "dedup-new": _DUPLICATES,
    "overlap": (*_DUPLICATES, "identities.parquet", "look_alikes.parquet"),
    "cluster": (
        *("faces.parquet", "clusters.parquet", "merges.parquet", "splits.parquet", "report.html"),
        *("persons.parquet", "named.parquet", "left_out.parquet"),
        *("sums.npz", "state.npz", "mark.json"),
        "centres.parquet",  # of older versions
    ),
    "clean": (
        *("decisions.parquet", "images.parquet", "identities.parquet", "report.html"),
        *("merges.parquet", "look_alikes.parquet"),
        *(
            "clean.csv",
            "clean.txt",
            "labels.csv",
            "msceleb.txt",
            "relabel.csv",
            "review.csv",
            "mark.json",
            "decided.json",
        ),
    ),
}
_GRAPH_FILES = re.compile(
    r"(?:graph|state|threshold)\.json|edges-\d+\.parquet|"
    r"(?:ids|sides|vectors|density|wide|cohort|histogram|impostors|representatives|cells|assigned|members|begins)\.npy"
)
# What an unfinished file has behind its name: of one writer, of one of several, and of older versions.
_UNFINISHED = re.compile(rf"(?:\.[0-9a-f]{{8}}|\.\d+)?{re.escape(UNFINISHED)}")
# Columns of which every table of a report has one.
_COLUMNS = frozenset({"face_id", "uri", "uri_a", "group", "cluster", "identity", "identity_a", "left"})
_HTML_BYTES = 4096  # in which the head of a page begins


def get_report_name(folder: str) -> str | None:
    """Return which report a folder is for, by its name alone; None if none has such a folder.

    Args:
        folder: name of the folder, such as `dedup` or `dedup.2f0c41d8a3b5e677.partial`.
    """
    work = _WORK.fullmatch(folder)
    name = work[1] if work else folder
    return name if name in _REPORT_FILES or name == GRAPH else None


def is_disposable(folder: str) -> bool:
    """Tell whether a folder holds only vectors or parts of reports, which the next report makes again."""
    name = get_report_name(folder)
    return name == GRAPH or (name is not None and name != folder)


def owns_file(report: str, name: str) -> bool:
    """Tell whether a file is one of a report, or an unfinished one.

    Args:
        report: the report's name, as `get_report_name` returns it.
        name: the file's name in the report's folder, with slashes. The name of a folder ends with one.
    """
    folder, slash, inner = name.partition("/")
    # A report on two galleries has a graph of its own, in its folder.
    if slash:
        is_graph = report == "overlap" and get_report_name(folder) == GRAPH
        return is_graph and (not inner or owns_file(GRAPH, inner))
    whole = _UNFINISHED.sub("", name) if name.endswith(UNFINISHED) else name
    if whole == MARKER or name in PRIVATE_NAMES:
        return True
    if report == GRAPH:
        return bool(_GRAPH_FILES.fullmatch(whole))
    return whole in _REPORT_FILES[report]


@dataclass
class ReportFolder:
    """A folder below reports/ that is ours, and what lies in it.

    Attributes:
        path: Path of the folder.
        report: Name of the report.
        files: Names of our files, in order.
        others: Names of other files and of links, in order.
    """

    path: str
    report: str
    files: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def owns(self, name: str) -> bool:
        """Tell whether a file of the folder is ours."""
        return owns_file(self.report, name)


def inspect_folder(path: str, report: str | None = None) -> ReportFolder | None:
    """Look at a local folder; None if it is not ours, is a link, or does not exist.

    Args:
        path: the folder.
        report: which report it is for; by default the folder's name says so.

    Raises:
        StorageError: the folder cannot be listed.
    """
    report = report or get_report_name(os.path.basename(path))
    if report is None or os.path.islink(path) or not os.path.isdir(path):
        return None
    folder = ReportFolder(path, report)
    for name, is_folder in walk_files(path):
        if not is_folder:
            is_own = owns_file(report, name) and not os.path.islink(os.path.join(path, name))
            (folder.files if is_own else folder.others).append(name)
    return folder if _is_ours(folder) else None


def is_our_listing(report: str, names: Collection[str]) -> bool:
    """Tell whether a listing of a folder in an object store is one of a report of this name.

    Args:
        report: the report's name, as `get_report_name` returns it.
        names: names of the objects in the folder.
    """
    return MARKER in names or all(owns_file(report, name) for name in names)


def _is_ours(folder: ReportFolder) -> bool:
    if MARKER in folder.files:
        return True
    # Older versions wrote no marker. Their reports are known by their files.
    if not folder.others:
        return bool(folder.files)
    return any(_is_readable_as_ours(os.path.join(folder.path, name)) for name in folder.files)


def _is_readable_as_ours(path: str) -> bool:
    """Tell whether a file with the name of one of ours has its form as well."""
    try:
        if path.endswith(".html"):
            with open(path, "rb") as page:
                head = page.read(_HTML_BYTES)
            return head.startswith(b"<!doctype html>") and b"Content-Security-Policy" in head
        if path.endswith(".parquet"):
            return not _COLUMNS.isdisjoint(pq.read_schema(path).names)
        if os.path.basename(path) == "graph.json":
            with open(path, encoding="utf-8") as file:
                return {"galleries", "versions", "settings"} <= set(json.load(file))
    except (OSError, ValueError, TypeError, pa.ArrowException):
        pass
    return False


def prepare_folder(folder: str, report: str, version: int | None = None) -> None:
    """Make a folder to write a report into, and mark it as ours. What an interrupted run left in it stays.

    Args:
        folder: the folder.
        report: the report's name.
        version: version of the gallery's table that the report is made from.

    Raises:
        StorageError: the folder holds files and is not ours, or is a link, or one of our names in it is a link.
    """
    assert report == GRAPH or report in _REPORT_FILES, f"name the files of {report} in _REPORT_FILES"
    require_ours(folder, report)
    content = {
        "format": _FORMAT,
        "report": report,
        "facepipe": facepipe.__version__,
        "made": format_date(),
        "command": get_command(),
        "version": version,
    }
    storage.replace(os.path.join(folder, MARKER), json.dumps(content).encode())


def describe_reports(gallery: Gallery) -> list[dict[str, Any]]:
    """Describe the reports of a gallery: when each was made, how, from which version of the table, and if it is stale.

    Reports of older versions do not say when they were made; nothing is known of what they rest on.
    """
    described = []
    for report in _REPORT_FILES:
        folder = storage.join(gallery.path, "reports", report)
        marker = _read_json(storage.join(folder, MARKER))
        if marker is None:
            continue
        # A report that found nothing new has a newer mark than its folder says.
        mark = ReadMark.load(storage.join(folder, "mark.json"))
        version = marker.get("version")
        if mark is not None and mark.gallery == gallery.id:
            version = mark.version
        described.append(
            {
                "report": report,
                "made": marker.get("made", ""),
                "facepipe": marker.get("facepipe", ""),
                "command": marker.get("command", ""),
                "version": version,
                "up to date": None if version is None else gallery.has_files_of(version),
            }
        )
    return described


def _read_json(path: str) -> dict[str, Any] | None:
    """Read a JSON object; None if the file is missing or damaged, because it only informs."""
    try:
        values = json.loads(storage.read(path))
    except (StorageError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def require_ours(folder: str, report: str) -> None:
    """Raise StorageError for a folder that is not one of this report, or that leads elsewhere.

    An empty folder, or one that does not exist, is fine. A link with the name of one of our files is not, because what
    is read from it or written to it is not ours.
    """
    if os.path.islink(folder):
        raise make_link_error(folder)
    if not os.path.isdir(folder):
        return
    for name, is_folder in walk_files(folder):
        if not is_folder and owns_file(report, name) and os.path.islink(os.path.join(folder, name)):
            raise make_link_error(os.path.join(folder, name))
    if os.listdir(folder) and inspect_folder(folder, report) is None:
        raise StorageError(f"{folder!r} holds files that facepipe did not write: move the folder elsewhere")


def delete_report(folder: str, report: str) -> None:
    """Delete the files of a report's folder that are ours, and the folder if nothing else is in it."""
    delete_owned_folder(folder, lambda name: owns_file(report, name))


def replace_report(folder: str, successor: str, report: str) -> None:
    """Delete the files of a report's folder, and move what else is in it to its successor.

    Args:
        folder: the folder to delete. There may be none.
        successor: folder that stays.
        report: the report's name.

    Raises:
        OSError: something cannot be moved.
        StorageError: something cannot be deleted.
    """
    if os.path.isdir(folder):
        _move_others(report, folder, successor, "")
        delete_report(folder, report)


def take_over_folders(final: str, partial: str, report: str) -> None:
    """Take over what earlier runs left beside a folder, so that none of them can publish it any more.

    A run may be paused for hours, and go on when another one makes the report. Each works in a folder of its own name.
    What is taken over changes its name or is deleted, so that a run which wakes finds its folder gone.

    Args:
        final: the folder of the report. There may be none.
        partial: folder that this run works in. It gets the files of the last interrupted run, if there are any.
        report: the report's name.

    Raises:
        OSError: something cannot be moved.
        StorageError: something cannot be deleted.
    """
    parent, base = os.path.split(final)
    names = os.listdir(parent) if os.path.isdir(parent) else []
    matches = ((name, _WORK.fullmatch(name)) for name in names)
    leftovers = [
        os.path.join(parent, name)
        for name, match in matches
        if match and match[1] == base and name != os.path.basename(partial)
    ]
    for path in leftovers:
        with suppress(OSError):
            os.rmdir(path)  # a run was killed before it had written anything
    leftovers = [path for path in leftovers if inspect_folder(path, report) is not None]
    unfinished = sorted((path for path in leftovers if path.endswith(PARTIAL)), key=os.path.getmtime)
    # The last one may be resumed.
    if unfinished and not os.path.lexists(partial):
        os.rename(unfinished[-1], partial)
    for path in leftovers:
        if os.path.isdir(final):
            replace_report(path, final, report)
        else:
            delete_report(path, report)


def delete_uploads(reports: str, lease: Lease) -> int:
    """Have the store delete parts of reports whose upload never ended; return how many uploads there were.

    Args:
        reports: folder of the reports, local or a URL.
        lease: of the reports.

    Raises:
        GalleryBusyError: another run has taken the lease over.
        UploadsUnknownError: the store cannot be asked for them.
    """
    return len(abort_uploads(reports, lease, _owns_object))


def _owns_object(name: str) -> bool:
    """Tell whether an object is part of a report, by its name below the reports."""
    folder, _, inner = name.partition("/")
    report = get_report_name(folder)
    return report is not None and owns_file(report, inner)


def _move_others(report: str, source: str, target: str, inner: str) -> None:
    with os.scandir(os.path.join(source, inner)) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        name = f"{inner}/{entry.name}" if inner else entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and owns_file(report, name + "/"):
            _move_others(report, source, target, name)
        elif entry.is_symlink() or is_folder or not owns_file(report, name):
            destination = _find_free_name(os.path.join(target, name))
            os.makedirs(os.path.dirname(destination), exist_ok=True)
            os.rename(entry.path, destination)


def _find_free_name(path: str) -> str:
    number = 1
    candidate = path
    while os.path.lexists(candidate):
        candidate = f"{path}.{number}"
        number += 1
    return candidate
