"""Who is gone, and what a column or a field would betray of them.

What it holds is told by its name, so that a label that is also a word of ours ("keep", "12") takes nothing of others
along.
"""

import re
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from facepipe.types import Int64, UInt64

URIS, NAMES, CONTENTS, IDS, ANY = "uris", "names", "contents", "ids", "any"
_ROLES = (
    (re.compile(r"uri.*|kept_uri|path"), URIS),
    (re.compile(r"(nearest_)?identity.*|suggested|left|right"), NAMES),
    (re.compile(r"image_id.*"), CONTENTS),
    (re.compile(r"face_id.*|medoid"), IDS),
    (re.compile(r"decision|reason|kind|label|probability"), None),  # words and numbers of ours
)


@dataclass(frozen=True)
class ErasedData:
    """What must not be left. names: labels that no image bears any more; faces: sorted ids; marks: sorted `compute_marks`
    of the vectors."""

    uris: frozenset[str]
    names: frozenset[str]
    contents: frozenset[str]
    faces: Int64
    marks: UInt64

    @cached_property
    def by_role(self) -> dict[str, frozenset[str]]:
        """What betrays somebody in a column of texts, by what the column holds."""
        ids = frozenset(map(str, self.faces.tolist()))
        kinds = {URIS: self.uris, NAMES: self.names, CONTENTS: self.contents, IDS: ids}
        return {**kinds, ANY: self.uris | self.names | self.contents}

    @cached_property
    def arrays(self) -> dict[str, pa.Array]:
        """The same for Arrow."""
        texts = {role: pa.array(sorted(values), pa.string()) for role, values in self.by_role.items() if role != IDS}
        return {**texts, IDS: pa.array(self.faces)}


def find_role(column: str) -> str | None:
    """What a column, or a field of a list, holds; None where nobody can be told by it."""
    return next((role for pattern, role in _ROLES if pattern.fullmatch(column)), ANY)
