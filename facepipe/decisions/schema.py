"""The columns of the table of decisions, the kinds of decisions, and the id of a decision."""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

IS = "is"
IS_NOT = "is_not"
SAME_AS = "same_as"
DIFFERENT_FROM = "different_from"
NOT_A_FACE = "not_a_face"
IGNORE = "ignore"
KEEP = "keep"
UNDO = "undo"

SCHEMA = pa.schema(
    [
        ("decision_id", pa.string()),  # 32 hex digits: a hash of what was decided
        ("decision", pa.string()),  # one of KINDS
        ("face_id", pa.int64()),
        ("other_face_id", pa.int64()),  # the second face of same_as and different_from
        ("image_id", pa.string()),  # with the box, this finds the face again under another id
        ("box", pa.list_(pa.float32())),
        ("other_image_id", pa.string()),
        ("other_box", pa.list_(pa.float32())),
        ("person", pa.string()),
        ("other_person", pa.string()),  # for decisions about two persons
        ("who", pa.string()),  # who decided
        ("decided_at", pa.timestamp("us", "UTC")),  # null if the file that it came from does not say
        ("why", pa.string()),
        ("undoes", pa.string()),  # decision_id that an undo takes back
        ("source", pa.string()),  # name of the file or report that it came from
        ("added_at", pa.timestamp("us", "UTC")),  # when it was put into the table
    ]
)


@dataclass(frozen=True)
class Kind:
    """What a kind of decision needs.

    Attributes:
        meaning: what it says, for help and messages.
        faces: number of faces that it is about.
        has_person: whether it names a person.
        is_symmetric: whether its two faces may change places.
    """

    meaning: str
    faces: int = 1
    has_person: bool = False
    is_symmetric: bool = False


KINDS = {
    IS: Kind("the face is this person", has_person=True),
    IS_NOT: Kind("the face is not this person", has_person=True),
    SAME_AS: Kind("the two faces are one person", faces=2, is_symmetric=True),
    DIFFERENT_FROM: Kind("the two faces are two persons", faces=2, is_symmetric=True),
    NOT_A_FACE: Kind("it is not a face"),
    IGNORE: Kind("leave the face out"),
    KEEP: Kind("the face is right as it is"),
    UNDO: Kind("takes another decision back", faces=0),
}
"""The kinds of decisions by name."""


def compute_decision_id(
    decision: str,
    *,
    face: str = "",
    other: str = "",
    person: str = "",
    other_person: str = "",
    who: str = "",
    decided_at: datetime | None = None,
    undoes: str = "",
) -> str:
    """Compute the id of a decision: the same decision of the same person at the same time has one id.

    Args:
        decision: one of KINDS.
        face: id of the face as text.
        other: id of the other face as text. Two faces of a symmetric kind may change places.
        person: name of the person.
        other_person: name of the other person.
        who: who decided, as the file says; empty if it does not.
        decided_at: when, as the file says.
        undoes: id of the decision that is taken back.
    """
    faces = [face, other]
    if KINDS[decision].is_symmetric:
        faces.sort()
    time = decided_at.astimezone(UTC).isoformat(timespec="microseconds") if decided_at is not None else ""
    content = json.dumps([decision, *faces, person, other_person, who, time, undoes], ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def conform_rows(rows: pa.Table) -> pa.Table:
    """Return rows with exactly the columns of the table; those that an older version did not know are null."""
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in SCHEMA
    ]
    return pa.table(columns, schema=SCHEMA)
