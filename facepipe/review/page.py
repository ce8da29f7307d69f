"""The page of a report in parts: groups from the report's file, pictures from the gallery, nothing that is hidden."""

import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from facepipe.errors import StorageError
from facepipe.gallery.hidden import HiddenWatch
from facepipe.gallery.table import Gallery
from facepipe.reports.html import JsonGroup, find_groups, read_head, render_served_page
from facepipe.reports.model import Report
from facepipe.reports.thumbs import recode
from facepipe.storage import describe_error

GROUPS_PER_PART = 1000
_MAX_CACHED_FACES = 40_000  # pictures in memory, of about 4 kB each


@dataclass(frozen=True)
class _FileState:
    """What tells whether a report was made anew."""

    inode: int
    size: int
    changed_ns: int


class ReviewPage:
    """The page of one report.

    A request sees the report and the gallery as they are now: a report that was made anew is read anew, and a face that
    was erased, or whose erasure is recorded, is in no answer.
    """

    def __init__(self, gallery: str, report: str, path: str):
        """Open the report.

        Args:
            gallery: path of the gallery.
            report: name of the report, such as `clean`.
            path: its page, report.html.
        """
        self.report = report
        self._path = path
        self._lock = threading.RLock()
        self._gallery = Gallery(gallery)
        self._hidden = HiddenWatch(self._gallery.path)
        self._gallery_state = self._read_gallery_state()
        self._file_state: _FileState | None = None
        self._offsets: list[int] = []
        self._head: Report | None = None
        # Of each face that was asked for, its row and its picture; of faces that are gone, nothing.
        self._faces: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._read_report()

    @property
    def gallery(self) -> Gallery:
        """The gallery, in its newest version."""
        with self._lock:
            self._refresh()
            return self._gallery

    @property
    def part_count(self) -> int:
        """Number of parts of the page, at least one."""
        with self._lock:
            return max(1, -(-len(self._offsets) // GROUPS_PER_PART))

    @property
    def has_questions(self) -> bool:
        """Whether anything can be decided on the page."""
        return self._head is not None and self._head.review is not None

    def render(self, part: int, acts: list[dict[str, Any]]) -> str:
        """Render a part of the page.

        Args:
            part: number of the part, from 0.
            acts: what is decided already.
        """
        with self._lock:
            self._refresh()
            groups = self._read_groups(part)
            self._load_faces(_list_ids(groups))
            hidden = self._hidden.read()
            hidden_uris = frozenset(hidden.uris.to_pylist())
            hidden_ids = frozenset(np.asarray(hidden.faces).tolist())
            shown = [_drop_pictures(group) for group in groups if self._is_whole(group, hidden_uris, hidden_ids)]
            assert self._head is not None
            server = {"acts": acts, "part": part, "parts": self.part_count, "per_part": GROUPS_PER_PART}
            return render_served_page(self._head, shown, len(self._offsets), server)

    def read_thumb(self, face_id: int) -> bytes | None:
        """Read the picture of a face as a JPEG; None if there is none, or if the face is gone or hidden."""
        with self._lock:
            self._refresh()
            self._load_faces([face_id])
            if face_id in np.asarray(self._hidden.read().faces):
                return None
            row = self._faces.get(face_id)
            return None if row is None or not row["thumb"] else recode(row["thumb"])

    # ---- the report

    def _read_report(self) -> None:
        """Find the head and the groups of the report's file."""
        try:
            stat = os.stat(self._path)
            self._head = read_head(self._path)
            self._offsets = find_groups(self._path)
        except OSError as error:
            raise StorageError(f"cannot read {self._path!r}: {describe_error(error)}") from error
        self._file_state = _FileState(stat.st_ino, stat.st_size, stat.st_mtime_ns)

    def _read_groups(self, part: int) -> list[JsonGroup]:
        offsets = self._offsets[part * GROUPS_PER_PART : (part + 1) * GROUPS_PER_PART]
        groups = []
        try:
            with open(self._path, "rb") as file:
                for offset in offsets:
                    file.seek(offset)
                    groups.append(json.loads(file.readline().removeprefix(b",")))
        except OSError as error:
            raise StorageError(f"cannot read {self._path!r}: {describe_error(error)}") from error
        return groups

    def _is_whole(self, group: JsonGroup, hidden_uris: frozenset[str], hidden_ids: frozenset[int]) -> bool:
        """Return whether no face of a group is gone or hidden since the report was made.

        If one is, the whole group stays away: its title and its answers may name the person.
        """
        for face in group["faces"]:
            if face["uri"] in hidden_uris:
                return False
            if "id" in face and (int(face["id"]) in hidden_ids or int(face["id"]) not in self._faces):
                return False
        return True

    # ---- the gallery

    def _refresh(self) -> None:
        """Read the report and the gallery anew if they have changed."""
        try:
            stat = os.stat(self._path)
        except OSError as error:
            raise StorageError(f"cannot read {self._path!r}: {describe_error(error)}") from error
        if self._file_state != _FileState(stat.st_ino, stat.st_size, stat.st_mtime_ns):
            self._read_report()
        state = self._read_gallery_state()
        if state is None or state != self._gallery_state:
            newest = Gallery(self._gallery.path)
            if state is None and newest.version == self._gallery.version:
                return
            self._gallery = newest
            self._gallery_state = state
            self._faces.clear()

    def _read_gallery_state(self) -> tuple[int, int] | None:
        """Read what changes with each version of a local gallery's table; None if that cannot be told."""
        try:
            stat = os.stat(os.path.join(self._gallery.faces_folder, "_delta_log"))
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns

    def _load_faces(self, ids: list[int]) -> None:
        """Read rows and pictures of faces that are not in memory, in one pass over the gallery."""
        wanted = np.unique(np.array([face_id for face_id in ids if face_id not in self._faces], np.int64))
        if not len(wanted):
            return
        columns = ["face_id", "thumb"]
        for part in self._gallery.read_chosen_rows("face_id", pa.array(wanted, pa.int64()), columns):
            for row in part.to_pylist():
                self._faces[row["face_id"]] = row
        while len(self._faces) > max(_MAX_CACHED_FACES, len(ids)):
            self._faces.popitem(last=False)


def _drop_pictures(group: JsonGroup) -> JsonGroup:
    """Leave the pictures out: those of a served page have addresses."""
    faces = [{name: value for name, value in face.items() if name != "jpeg"} for face in group["faces"]]
    return {**group, "faces": faces}


def _list_ids(groups: list[JsonGroup]) -> list[int]:
    return [int(face["id"]) for group in groups for face in group["faces"] if "id" in face]
