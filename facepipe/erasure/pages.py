"""Report pages without erased data: faces leave groups, and groups and rows of tables leave the page.

A page holds its own content (`facepipe.reports.html`), so it is edited as data and rendered again.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from facepipe.erasure.erased_data import IDS, ErasedData
from facepipe.reports.html import JsonGroup, edit_report
from facepipe.reports.model import Report, Table
from facepipe.reports.questions import ASKS_FOR

# Pages whose group titles hold no labels.
_PAGES_WITHOUT_NAMES = ("Identity clusters", "Duplicate images")
# How the titles of tables begin whose first two columns hold labels; the first is that of older versions.
_TABLES_OF_NAMES = ("Shared identities", "Persons in both", "Look-alikes")


def scrub_page(path: str, erased: ErasedData) -> bool:
    """Remove erased data from a page.

    If the head of a page mentions an erased image elsewhere, the page is deleted. The next report makes it again.

    Returns:
        Whether the page was changed or deleted.

    Raises:
        PageFormatError: an older facepipe wrote the page, so its content cannot be read.
    """
    # The page is edited first; what its head still mentions decides whether it stays.
    editor = _PageEditor(erased)
    is_changed = edit_report(path, editor.edit_head, editor.edit_group)
    if editor.mentions_erased:
        os.unlink(path)
        return True
    return is_changed


class _PageEditor:
    """The edits of one page."""

    def __init__(self, erased: ErasedData) -> None:
        self._erased = erased
        self._names = erased.names
        self._face_ids = erased.by_role[IDS]
        self.mentions_erased = False

    def edit_head(self, head: Report) -> Report:
        """Remove rows that name erased people, and note whether anything else mentions an erased image."""
        # Titles of such pages hold no labels, and a label may be a word in them.
        if head.title in _PAGES_WITHOUT_NAMES:
            self._names = frozenset()
        edited = replace(head, tables=tuple(self._edit_table(table) for table in head.tables))
        self.mentions_erased = not self._erased.uris.isdisjoint(_iterate_texts(edited))
        return edited

    def _edit_table(self, table: Table) -> Table:
        if not table.title.startswith(_TABLES_OF_NAMES):
            return table
        # In this table a label in one of the first two columns removes the row.
        revealing = self._erased.names | self._erased.uris
        return replace(table, rows=tuple(row for row in table.rows if revealing.isdisjoint(row[:2])))

    def edit_group(self, group: JsonGroup) -> JsonGroup | None:
        """Remove erased faces and labels; drop a group that loses all faces, or whose title names an erased label."""
        # A title with the label removes the whole group; else single faces go.
        if not self._names.isdisjoint(_find_labels(group["title"])):
            return None
        faces = [face for face in group["faces"] if not self._is_erased(face)]
        if not faces:
            return None
        # Names of figures may be labels too.
        figures = [figure for figure in group["figures"] if figure[0] not in self._names]
        edited = {**group, "figures": figures, "faces": faces}
        if "choices" in group:
            choices = [choice for choice in group["choices"] if not self._mentions_erased(choice)]
            # An answer that is left alone is no question any more.
            edited["choices"] = choices if len(choices) > 1 else []
        if len(faces) < len(group["faces"]):
            # Distances are listed by pairs of faces, in their order.
            edited.pop("distances", None)
        return edited

    def _is_erased(self, face: dict[str, Any]) -> bool:
        labels = {value for name, value in face.get("figures", ()) if name == "label"} | {face.get("person")}
        return (
            face["uri"] in self._erased.uris
            or face.get("id") in self._face_ids
            or not self._erased.names.isdisjoint(labels)
        )

    def _mentions_erased(self, choice: dict[str, Any]) -> bool:
        """Return whether an answer decides on an erased face, or names an erased person."""
        return any(
            row.get("person") in self._erased.names or not self._face_ids.isdisjoint([*row["faces"], row.get("other")])
            for row in choice["rows"]
        )


def _iterate_texts(head: Report) -> Iterator[str]:
    """Iterate over all texts that the head of a page shows."""
    yield head.title
    yield head.subtitle
    yield from head.notes
    yield from head.findings
    for step in head.steps:
        yield from (step.text, step.command)
    for figure in (*head.figures, *head.details):
        yield from (figure.label, figure.value, figure.note)
    for histogram in head.histograms:
        yield from (histogram.title, histogram.x_label)
        yield from (series.name for series in histogram.series)
        yield from (mark.label for mark in histogram.marks)
    for table in head.tables:
        yield table.title
        yield from table.columns
        for row in table.rows:
            yield from row


def _find_labels(title: str) -> Iterator[str]:
    """Find what may be a label in a title.

    Titles are such as `A: two persons?`, `A: is this B?`, `A and B: one person?` or
    `A here, B there`.
    """
    # Labels may hold the words between the two names as well.
    for words in re.finditer(" here, ", title):
        yield title[: words.start()]
        yield title[words.end() :].removesuffix(" there")
    for words in re.finditer(re.escape(ASKS_FOR), title):
        yield title[words.end() :].removesuffix("?")
    # Each colon may end the label, since labels may hold colons, and each "and" may join two labels.
    for colon in re.finditer(":|$", title):
        subject = title[: colon.start()]
        yield subject
        for conjunction in re.finditer(" and ", subject):
            yield subject[: conjunction.start()]
            yield subject[conjunction.end() :]
