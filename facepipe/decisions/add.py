"""Check decisions and append them to the table: the same file applied twice adds nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from facepipe.decisions.conflicts import find_conflicts
from facepipe.decisions.only_faces import fill_only_faces
from facepipe.decisions.read import drop_hidden
from facepipe.decisions.resolve import FaceKeys, find_faces, to_box_column, to_ids
from facepipe.decisions.rows import PROPOSED, Problem, Problems, WrittenRow, parse_rows
from facepipe.decisions.schema import KINDS, SCHEMA, UNDO, compute_decision_id, conform_rows
from facepipe.decisions.table import DecisionTable, DecisionWriter, hold_decisions
from facepipe.decisions.undo import drop_repeated, find_active
from facepipe.errors import ConfigError, GalleryBusyError
from facepipe.gallery.hidden import HiddenWatch, list_complete, list_requests
from facepipe.gallery.table import Gallery
from facepipe.types import Bool

_MIN_PREFIX = 6
_BATCH_ROWS = 8192


@dataclass
class AddSummary:
    """What was added, or would be.

    Attributes:
        rows: rows that were read.
        added: decisions that were added, by kind.
        known: rows that the table had already.
        undone: those among them that somebody has taken back. They stay taken back.
        replaced: older decisions that were taken back because new ones say the opposite.
        refused: rows that cannot be applied.
        problems: why, for the first hundred of them.
        is_applied: whether the table holds all rows that are not refused. False if there are refused rows that nobody
            said to skip, and in a dry run.
        dry_run: nothing was written; the counts say what would be.
        added_ids: sorted ids of the decisions that were added.
        version: version of the table of decisions; -1 if there is none.
    """

    rows: int = 0
    added: dict[str, int] = field(default_factory=dict)
    known: int = 0
    undone: int = 0
    replaced: int = 0
    refused: int = 0
    problems: list[Problem] = field(default_factory=list)
    is_applied: bool = False
    dry_run: bool = False
    added_ids: list[str] = field(default_factory=list)
    version: int = -1


@dataclass(frozen=True)
class AddOptions:
    """How rows are added.

    Attributes:
        who: who has decided, for rows that do not say.
        skip_bad: add the other rows if some cannot be applied. By default nothing is added then.
        replace: take an older decision back if a new one says the opposite. By default that is a conflict.
        dry_run: only say what would be done.
    """

    who: str = ""
    skip_bad: bool = False
    replace: bool = False
    dry_run: bool = False


def add_decisions(
    gallery: Gallery | str,
    rows: Iterable[Mapping[str, Any] | WrittenRow],
    *,
    who: str = "",
    source: str = "",
    skip_bad: bool = False,
    replace: bool = False,
    dry_run: bool = False,
) -> AddSummary:
    """Add decisions to a gallery.

    A row is a mapping with the names of the JSON lines file: `decision`, `face_id` (a text, or a number if it is
    exact), `other_face_id`, `person`, `who`, `when`, `why`, `undoes`; a face may also be given by `image_id` and `box`,
    or by `image_id` or `uri` alone if the image has one face. Every row gets an id that is a hash of what it says, so
    that rows that the table has already are not added again.

    Nothing is added if a row cannot be applied: an unknown face, a wrong value, or a decision that contradicts another
    one. `skip_bad` and `replace` choose otherwise. Two callers at once both succeed, one after the other; the second
    one sees the decisions of the first.

    Args:
        gallery: the gallery, or its path or URL.
        rows: the rows.
        who: who has decided, for rows that do not say.
        source: name of the report or file that they come from.
        skip_bad: add the other rows if some cannot be applied.
        replace: take an older decision back if a new one says the opposite.
        dry_run: only say what would be done.

    Returns:
        What was added. Look at `is_applied` and `problems`: refused rows raise nothing.

    Raises:
        GalleryError: there is no gallery, or its decisions cannot be read.
        GalleryBusyError: another writer has held the decisions for minutes.
        StorageError: something cannot be read or written.
    """
    opened = gallery if isinstance(gallery, Gallery) else Gallery(gallery)
    options = AddOptions(who=who, skip_bad=skip_bad, replace=replace, dry_run=dry_run)
    return _Addition(opened, options).run(_number_rows(rows, source))


def undo_decisions(
    gallery: Gallery | str, ids: Sequence[str], *, who: str = "", why: str = "", dry_run: bool = False
) -> AddSummary:
    """Take decisions back. To undo an undo brings the decision back.

    Args:
        gallery: the gallery, or its path or URL.
        ids: ids of decisions, or the first digits of an id if no other begins with them (at least six).
        who: who takes them back.
        why: why.
        dry_run: only say what would be done.

    Raises:
        ConfigError: no decision has such an id, or several have.
    """
    opened = gallery if isinstance(gallery, Gallery) else Gallery(gallery)
    table = DecisionTable(opened.path)
    known = table.read()["decision_id"].to_pylist() if table.exists else []
    now = datetime.now(UTC).isoformat()
    rows = [
        {"decision": UNDO, "undoes": _find_id(known, text), "who": who, "when": now, "why": why}
        for text in dict.fromkeys(ids)
    ]
    return add_decisions(opened, rows, who=who, dry_run=dry_run)


def _find_id(known: Sequence[str], text: str) -> str:
    """Find the one id that begins with a text."""
    prefix = text.strip().lower()
    matches = {decision_id for decision_id in known if decision_id.startswith(prefix)}
    if len(prefix) < _MIN_PREFIX:
        raise ConfigError(f"{text!r} is too short for an id of a decision: give {_MIN_PREFIX} digits or more")
    if not matches:
        raise ConfigError(f"no decision has the id {text!r}: `facepipe decisions GALLERY --all` lists them")
    if len(matches) > 1:
        raise ConfigError(f"{len(matches)} decisions have ids that begin with {text!r}: give more digits")
    return matches.pop()


def _number_rows(rows: Iterable[Mapping[str, Any] | WrittenRow], source: str) -> Iterable[WrittenRow]:
    for number, row in enumerate(rows, 1):
        if isinstance(row, WrittenRow):
            yield row
        else:
            yield WrittenRow(f"row {number}", row, source)


class _Addition:
    """One call of `add_decisions`."""

    def __init__(self, gallery: Gallery, options: AddOptions):
        self.gallery = gallery
        self.options = options
        self.summary = AddSummary(dry_run=options.dry_run)
        self.problems = Problems()
        self.erasures: frozenset[str] = frozenset()

    def run(self, written: Iterable[WrittenRow]) -> AddSummary:
        proposed = self._read(written)
        self.summary.rows = proposed.num_rows + self.problems.count
        # Faces are looked for before the lease is held, because that may take a while.
        self.erasures = _list_erasures(self.gallery.path)
        new = self._resolve(proposed)
        if self.options.dry_run:
            self._prepare(DecisionTable(self.gallery.path), new)
        elif self._may_go_on() and new.num_rows:
            with hold_decisions(self.gallery.path) as writer:
                self._append(writer, new)
        else:
            self._prepare(DecisionTable(self.gallery.path), new)
            self.summary.is_applied = self._may_go_on()
        self.summary.refused = self.problems.count
        self.summary.problems = self.problems.first
        return self.summary

    def _may_go_on(self) -> bool:
        return self.options.skip_bad or not self.problems.count

    def _append(self, writer: DecisionWriter, new: pa.Table) -> None:
        # An erasure that was recorded since may have looked at the decisions already.
        if _list_erasures(self.gallery.path) != self.erasures:
            raise GalleryBusyError("images were erased meanwhile, and nothing was added: run the same command again")
        rows = self._prepare(writer.table, new)
        self.summary.is_applied = self._may_go_on()
        if self.summary.is_applied and rows.num_rows:
            now = pa.scalar(datetime.now(UTC), pa.timestamp("us", "UTC"))
            stamped = rows.set_column(
                rows.column_names.index("added_at"), SCHEMA.field("added_at"), pa.repeat(now, rows.num_rows)
            )
            writer.append(stamped)
        self.summary.version = writer.table.version

    def _read(self, written: Iterable[WrittenRow]) -> pa.Table:
        return pa.concat_tables([PROPOSED.empty_table(), *parse_rows(written, self.problems)]).combine_chunks()

    # ---- faces

    def _resolve(self, proposed: pa.Table) -> pa.Table:
        """Find the faces of the rows, and give each row its id. Rows with unknown faces become problems.

        Returns:
            Rows with the table's columns and `place`, sorted by id, each id once.
        """
        # Rows that the table has already need no face: it may be gone since.
        known = DecisionTable(self.gallery.path)
        known_ids = known.read()["decision_id"].combine_chunks() if known.exists else pa.array([], pa.string())
        given = proposed["decision_id"].drop_null()
        given_ids = self._compute_ids(proposed)
        proposed = _set(proposed, "decision_id", given_ids)
        is_known = np.asarray(pc.is_in(given_ids, known_ids).to_numpy(zero_copy_only=False), bool)
        unknown = self._fill_only_faces(proposed.filter(pa.array(~is_known)))
        found = self._find_faces(unknown)
        # The id rests on the face as the file names it; on the face that was found if it names none.
        found = _set(found, "decision_id", self._compute_ids(found))
        found = self._drop_unknown_faces(unknown, found)
        again = proposed.filter(pa.array(is_known))
        rows = pa.concat_tables([_to_table_rows(again), _to_table_rows(found)])
        ordered = drop_repeated(rows.sort_by([("decision_id", "ascending"), ("place", "ascending")]))
        return self._fill_who(ordered, given)

    def _fill_only_faces(self, rows: pa.Table) -> pa.Table:
        for prefix in ("", "other_"):
            rows = fill_only_faces(self.gallery, rows, prefix, self.problems)
        return rows

    def _find_faces(self, rows: pa.Table) -> pa.Table:
        """Replace the faces of rows by those of the gallery; null for one that it does not hold."""
        keys = FaceKeys.from_rows(rows)
        others = FaceKeys.from_rows(rows, "other_")
        both = FaceKeys(
            np.concatenate([keys.face_id, others.face_id]),
            pa.concat_arrays([keys.image_id, others.image_id]),
            np.concatenate([keys.box, others.box]),
        )
        found = find_faces(self.gallery, both)
        count = rows.num_rows
        for prefix, part in (("", slice(0, count)), ("other_", slice(count, 2 * count))):
            ids = found.face_id[part]
            rows = _set(rows, f"{prefix}face_id", pa.array(ids, mask=ids < 0))
            rows = _set(rows, f"{prefix}image_id", found.image_id[part])
            rows = _set(rows, f"{prefix}box", to_box_column(found.box[part]))
        return rows

    def _drop_unknown_faces(self, written: pa.Table, found: pa.Table) -> pa.Table:
        """Drop rows whose face the gallery does not hold, or whose two faces are one."""
        is_good = np.ones(found.num_rows, bool)
        faces = np.array([kind.faces for kind in KINDS.values()])
        kinds = pc.index_in(found["decision"], value_set=pa.array(list(KINDS))).to_numpy(zero_copy_only=False)
        needed = faces[kinds] if found.num_rows else np.empty(0, np.int64)
        first = to_ids(found["face_id"])
        other = to_ids(found["other_face_id"])
        is_unknown = ((needed >= 1) & (first < 0)) | ((needed == 2) & (other < 0))
        is_one = (needed == 2) & (first == other) & (first >= 0)
        for at in np.flatnonzero(is_unknown | is_one).tolist():
            is_good[at] = False
            row = written.slice(at, 1).to_pylist()[0]
            if is_one[at]:
                self.problems.add(row["place"], f"both faces are face {first[at]} of the gallery")
                continue
            prefix = "" if first[at] < 0 else "other_"
            self.problems.add(row["place"], _explain_unknown_face(row, prefix))
        return found.filter(pa.array(is_good))

    def _compute_ids(self, rows: pa.Table) -> pa.Array:
        """Compute the ids of rows; null for one that lacks the id of a face. An id that a row has is kept."""
        columns = [name for name in PROPOSED.names if name not in ("box", "other_box")]
        # Some thousand rows at a time, because rows as dictionaries take ten times the memory.
        batches = rows.select(columns).to_batches(_BATCH_ROWS)
        ids = (pa.array(map(_compute_row_id, batch.to_pylist()), pa.string()) for batch in batches)
        return pa.concat_arrays([pa.array([], pa.string()), *ids])

    def _fill_who(self, rows: pa.Table, exported: pa.ChunkedArray) -> pa.Table:
        """Fill in who has decided, but in rows that come from an export: there it is known that nobody said."""
        is_open = pc.invert(pc.is_in(rows["decision_id"], value_set=exported.combine_chunks()))
        who = pc.if_else(is_open, pc.fill_null(rows["who"], self.options.who), rows["who"])
        return _set(rows, "who", who) if self.options.who else rows

    # ---- what the table holds

    def _prepare(self, table: DecisionTable, new: pa.Table) -> pa.Table:
        """Choose what is appended to the table in its newest version, and count it."""
        known = drop_repeated(table.read()) if table.exists else SCHEMA.empty_table()
        new = self._drop_known(known, new)
        new = self._drop_undos_of_nothing(known, new)
        new = self._settle_conflicts(table, known, new)
        self.summary.added = {
            kind: count for kind in KINDS if (count := pc.sum(pc.equal(new["decision"], kind)).as_py() or 0)
        }
        self.summary.added_ids = new["decision_id"].to_pylist()
        self.summary.version = table.version
        return conform_rows(new)

    def _drop_known(self, known: pa.Table, new: pa.Table) -> pa.Table:
        """Drop rows that the table has. One that has the id of another decision is a problem."""
        at = pc.index_in(new["decision_id"], value_set=known["decision_id"].combine_chunks())
        is_known = at.is_valid().to_numpy()
        if not is_known.any():
            return new
        again = new.filter(pa.array(is_known))
        old = known.take(at.drop_null())
        is_active = find_active(known)[at.drop_null().to_numpy()]
        is_other = pc.not_equal(again["decision"], old["decision"]).to_numpy()
        for name in ("person", "undoes"):
            is_other |= pc.not_equal(pc.fill_null(again[name], ""), pc.fill_null(old[name], "")).to_numpy()
        for place in again.filter(pa.array(is_other))["place"].to_pylist():
            self.problems.add(place, "it has the id of another decision: leave `decision_id` out")
        self.summary.known = int((~is_other).sum())
        self.summary.undone = int((~is_other & ~is_active).sum())
        return new.filter(pa.array(~is_known))

    def _drop_undos_of_nothing(self, known: pa.Table, new: pa.Table) -> pa.Table:
        ids = pa.concat_arrays([known["decision_id"].combine_chunks(), new["decision_id"].combine_chunks()])
        is_undo = pc.equal(new["decision"], UNDO)
        is_lost = pc.and_(is_undo, pc.invert(pc.is_in(new["undoes"], value_set=ids)))
        for row in new.filter(is_lost).select(["place", "undoes"]).to_pylist():
            self.problems.add(row["place"], f"there is no decision {row['undoes']} to take back")
        return new.filter(pc.invert(is_lost))

    def _settle_conflicts(self, table: DecisionTable, known: pa.Table, new: pa.Table) -> pa.Table:
        """Take back what new rows contradict, or drop these, or name the conflicts, as the options say."""
        hidden = HiddenWatch(table.gallery).read()
        while True:
            rows = pa.concat_tables([_with_place(known), new])
            is_new = np.arange(rows.num_rows) >= known.num_rows
            is_active = find_active(rows) & ~_to_mask(pc.equal(rows["decision"], UNDO))
            at = np.flatnonzero(is_active)
            active = rows.take(pa.array(at))
            # Faces that are being erased contradict nothing any more.
            if hidden:
                active = drop_hidden(active.append_column("at", pa.array(at)), hidden)
                at = active["at"].to_numpy()
            conflicts = find_conflicts(active, concerning=is_new[at])
            undos: list[dict[str, Any]] = []
            dropped: set[int] = set()
            for conflict in conflicts:
                positions = [int(at[row]) for row in conflict.rows]
                older = [position for position in positions if not is_new[position]]
                newer = [position for position in positions if is_new[position]]
                if self.options.replace and len(older) == 1:
                    undos.append(self._make_undo(rows, older[0], newer[0]))
                    continue
                if dropped.isdisjoint(newer):
                    self._note_conflict(rows, conflict.reason, positions, newer)
                dropped.update(newer)
            if not undos and not dropped:
                return new
            kept = np.array([n for n in range(new.num_rows) if n + known.num_rows not in dropped], np.int64)
            new = new.take(pa.array(kept))
            if undos:
                self.summary.replaced += len({undo["undoes"] for undo in undos})
                taken = pa.Table.from_pylist(undos, new.schema)
                new = drop_repeated(pa.concat_tables([new, taken]).combine_chunks())

    def _make_undo(self, rows: pa.Table, older: int, newer: int) -> dict[str, Any]:
        """Make the undo of a decision that a new one contradicts."""
        old = rows.slice(older, 1).to_pylist()[0]
        row = rows.slice(newer, 1).to_pylist()[0]
        return {
            "decision_id": compute_decision_id(
                UNDO, who=row["who"] or "", decided_at=row["decided_at"], undoes=old["decision_id"]
            ),
            "decision": UNDO,
            "undoes": old["decision_id"],
            "who": row["who"],
            "decided_at": row["decided_at"],
            "why": f"replaced by {row['decision_id']}",
            "source": row["source"],
            "place": row["place"],
        }

    def _note_conflict(self, rows: pa.Table, reason: str, positions: list[int], newer: list[int]) -> None:
        """Name a conflict: the new row that comes first, and what it contradicts."""
        described = {position: _describe_row(rows.slice(position, 1).to_pylist()[0]) for position in positions}
        first = newer[0]
        place = rows["place"][first].as_py()
        others = "; ".join(text for position, text in described.items() if position != first)
        self.problems.add(place, f"conflict: {reason}. It contradicts {others}" if others else f"conflict: {reason}")
        for position in newer[1:]:
            self.problems.add(rows["place"][position].as_py(), f"conflict: see {place}")


def _list_erasures(gallery: str) -> frozenset[str]:
    """List the ids of all erasures, complete or not."""
    return frozenset(list_requests(gallery)) | list_complete(gallery)


def _to_mask(column: pa.Array | pa.ChunkedArray) -> Bool:
    return np.asarray(column.to_numpy(zero_copy_only=False), bool)


def _compute_row_id(row: dict[str, Any]) -> str | None:
    faces = KINDS[row["decision"]].faces
    if row["decision_id"] is not None:
        return str(row["decision_id"])
    if (faces >= 1 and row["face_id"] is None) or (faces == 2 and row["other_face_id"] is None):
        return None
    return compute_decision_id(
        row["decision"],
        face=str(row["face_id"]) if faces else "",
        other=str(row["other_face_id"]) if faces == 2 else "",
        person=row["person"] or "",
        other_person=row["other_person"] or "",
        who=row["who"] or "",
        decided_at=row["decided_at"],
        undoes=row["undoes"] or "",
    )


def _set(rows: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    at = rows.column_names.index(name)
    return rows.set_column(at, rows.schema.field(name), column)


def _to_table_rows(rows: pa.Table) -> pa.Table:
    """Return proposed rows with the table's columns, and `place`. Of two symmetric faces the smaller id comes first."""
    first = to_ids(rows["face_id"])
    other = to_ids(rows["other_face_id"])
    is_symmetric = pc.is_in(
        rows["decision"], value_set=pa.array([name for name, kind in KINDS.items() if kind.is_symmetric])
    )
    is_swapped = _to_mask(is_symmetric) & (other >= 0) & (other < first)
    if is_swapped.any():
        order = np.where(is_swapped, np.arange(len(first)) + len(first), np.arange(len(first)))
        back = np.where(is_swapped, np.arange(len(first)), np.arange(len(first)) + len(first))
        for name in ("face_id", "image_id", "box"):
            both = pa.concat_arrays([*rows[name].chunks, *rows[f"other_{name}"].chunks])
            rows = _set(_set(rows, name, both.take(pa.array(order))), f"other_{name}", both.take(pa.array(back)))
    return conform_rows(rows).append_column("place", rows["place"])


def _with_place(rows: pa.Table) -> pa.Table:
    return rows.append_column("place", pa.nulls(rows.num_rows, pa.string()))


def _explain_unknown_face(row: dict[str, Any], prefix: str) -> str:
    face_id = row[f"{prefix}face_id"]
    image_id = row[f"{prefix}image_id"]
    if face_id is None:
        return f"no face of the gallery lies at this box of the image {image_id}"
    if image_id is None or row[f"{prefix}box"] is None:
        return (
            f"the gallery has no face {face_id}; if it was embedded anew, `image_id` and `box` in the row would find "
            "the face again"
        )
    return f"the gallery has no face {face_id}, and none at this box of the image {image_id}"


def _describe_row(row: dict[str, Any]) -> str:
    """Describe a decision in a message."""
    what = row["decision"]
    if row["person"]:
        what = f"{what} {row['person']!r}"
    faces = " and ".join(str(row[name]) for name in ("face_id", "other_face_id") if row[name] is not None)
    where = row["place"] or f"the decision {row['decision_id'][:8]} of {row['who'] or 'somebody'}"
    return f"{where} ({what}, face {faces})"
