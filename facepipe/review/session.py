"""What one reviewer decides on a page and takes back: checked, and put into the gallery at once."""

import math
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from facepipe.decisions import UNDO, add_decisions, read_decisions, undo_decisions
from facepipe.errors import FacepipeError
from facepipe.review.page import ReviewPage

# What an act may hold at most.
_MAX_ROWS = 1000
_MAX_FACES = 20_000
_MAX_TEXT = 1000
_KINDS = ("is", "is_not", "same_as", "different_from", "not_a_face", "ignore", "keep")


class ActError(FacepipeError):
    """An act that cannot be saved."""


class ReviewSession:
    """One page, one reviewer. Methods may be called from several threads."""

    def __init__(self, page: ReviewPage, who: str):
        """Begin without acts.

        Args:
            page: the page.
            who: who decides.
        """
        self.page = page
        self._who = who
        self._lock = threading.Lock()
        self._acts: dict[str, dict[str, Any]] = {}
        # Ids of decisions by act: those of the acts that hold, and the undos of those that were taken back.
        self._added: dict[str, list[str]] = {}
        self._undos: dict[str, list[str]] = {}

    @property
    def saved(self) -> int:
        """Number of acts that were saved and not taken back."""
        return len(self._acts)

    def render(self, part: int) -> str:
        """Render a part of the page with all that is decided."""
        with self._lock:
            acts = [self._read_decided(), *self._acts.values()]
        return self.page.render(part, acts)

    def decide(self, act: Any) -> dict[str, Any]:
        """Save an act. It replaces older decisions that say the opposite, and an earlier answer to its group.

        Returns:
            `replaced`: the number of decisions that were taken back for it.

        Raises:
            ActError: the act is not what the page sends, or its faces are not in the gallery.
        """
        _check_act(act)
        with self._lock:
            if act["id"] in self._acts:
                return {"replaced": 0}
            if act["id"] in self._undos:
                self._redo(act)
                return {"replaced": 0}
            rows = [*self._undo_earlier(act), *_list_rows(act)]
            summary = add_decisions(
                self.page.gallery,
                rows,
                who=self._who,
                source=f"review {self.page.report}",
                replace=True,
            )
            if not summary.is_applied:
                reasons = "; ".join(str(problem.reason) for problem in summary.problems[:3])
                raise ActError(reasons or "the decision cannot be added")
            self._acts[act["id"]] = act
            self._added[act["id"]] = summary.added_ids
            return {"replaced": summary.replaced}

    def undo(self, act_id: Any) -> None:
        """Take an act of this session back, and bring back what it had replaced.

        Raises:
            ActError: there is no such act.
        """
        with self._lock:
            if not isinstance(act_id, str) or act_id not in self._acts:
                raise ActError("this was not decided in this session: `facepipe decisions` undoes it")
            # What is kept of the act brings it back.
            self._undos[act_id] = self._take_back(self._added[act_id], "undone on the page")
            del self._acts[act_id]

    def _redo(self, act: dict[str, Any]) -> None:
        """Bring an act back by taking its undo back: the same rows again would change nothing."""
        self._take_back(self._undos[act["id"]], "done again on the page")
        del self._undos[act["id"]]
        self._acts[act["id"]] = act

    def _take_back(self, ids: list[str], why: str) -> list[str]:
        """Take decisions, or undos, back; returns the ids of the undos."""
        if not ids:
            return []
        summary = undo_decisions(self.page.gallery, ids, who=self._who, why=why)
        if not summary.is_applied:
            raise ActError("; ".join(str(problem.reason) for problem in summary.problems[:3]))
        return summary.added_ids

    def _undo_earlier(self, act: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """List the undos of earlier answers to the same group."""
        group = act.get("group")
        if not group:
            return
        for other_id, other in self._acts.items():
            if other.get("group") != group:
                continue
            for decision_id in self._added[other_id]:
                yield {"decision": UNDO, "undoes": decision_id, "when": _format_time(act["at"])}

    def _read_decided(self) -> dict[str, Any]:
        """Read what the gallery holds already, as an act without an id: the page cannot undo it."""
        decisions = read_decisions(self.page.gallery)
        rows = []
        columns = decisions.rows.select(["decision", "person"]).to_pylist()
        for row, face, other in zip(columns, decisions.face_id, decisions.other_face_id, strict=True):
            if face < 0 or row["decision"] not in _KINDS:
                continue
            entry: dict[str, Any] = {"decision": row["decision"], "faces": [str(face)]}
            if other >= 0:
                entry["other"] = str(other)
            if row["person"]:
                entry["person"] = row["person"]
            rows.append(entry)
        return {"id": "", "at": 0, "rows": rows}


def _format_time(at: float) -> str:
    return datetime.fromtimestamp(at / 1000, UTC).isoformat()


def _list_rows(act: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """List the rows of an act as `add_decisions` takes them, one per face."""
    for row in act["rows"]:
        for face in row["faces"]:
            entry = {"decision": row["decision"], "face_id": face, "when": _format_time(act["at"])}
            for name, key in (("other", "other_face_id"), ("person", "person")):
                if row.get(name):
                    entry[key] = row[name]
            if act.get("why"):
                entry["why"] = act["why"]
            yield entry


def _check_act(act: Any) -> None:
    """Check that an act has the form that the page sends; what it means is checked by `add_decisions`.

    Raises:
        ActError: it has not.
    """
    if not isinstance(act, dict):
        raise ActError("an act is an object")
    if not _is_text(act.get("id"), 100) or not act["id"]:
        raise ActError("an act needs an id")
    at = act.get("at")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at) or not 0 <= at < 1e14:
        raise ActError("an act needs a time, in milliseconds")
    if not all(_is_text(act.get(name, ""), _MAX_TEXT) for name in ("group", "key", "why")):
        raise ActError("group, key and why are texts")
    rows = act.get("rows")
    if not isinstance(rows, list) or not 0 < len(rows) <= _MAX_ROWS:
        raise ActError(f"an act has between 1 and {_MAX_ROWS:,} rows")
    face_count = 0
    for row in rows:
        if not isinstance(row, dict) or row.get("decision") not in _KINDS:
            raise ActError("a row needs a decision")
        faces = row.get("faces")
        if not isinstance(faces, list) or not all(_is_id(face) for face in faces):
            raise ActError("a row needs faces, with their ids as texts")
        if not all(_is_text(row.get(name, ""), _MAX_TEXT) for name in ("person", "other")):
            raise ActError("person and other are texts")
        if row.get("other") and not _is_id(row["other"]):
            raise ActError("the other face needs an id")
        face_count += len(faces)
    if not 0 < face_count <= _MAX_FACES:
        raise ActError(f"an act is about 1 to {_MAX_FACES:,} faces")


def _is_text(value: Any, max_length: int) -> bool:
    return isinstance(value, str) and len(value) <= max_length


def _is_id(value: Any) -> bool:
    return isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= 19
