"""Pages of reports without the erased: faces leave groups, groups and rows of tables leave the page."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from html import unescape
from typing import Any

from facepipe.erasure.gone import Gone
from facepipe.erasure.lists import put_in_place

_GROUP = '{"title":'
_TITLE = re.compile(r"<title>(?P<title>[^<]*)</title>")
_NAMELESS = ("Identity clusters", "Duplicate images", "What two galleries share")  # pages whose titles name nobody
_SHARED = re.compile(r"<table>\s*<caption>Shared identities.*?</table>", re.DOTALL)
_TABLE_ROW = re.compile(r"[ \t]*<tr><td.*?</tr>\n?", re.DOTALL)
_CELL = re.compile(r"<td[^>]*>([^<]*)</td>")
_TEXT = re.compile(r">([^<]+)<")
_SPELT = re.compile(r"\\u\{([0-9a-f]+)\}")  # how pages show what would hide
_TOTAL = re.compile(r'(id="summary">\{"total":)(\d+)')


def scrub_page(path: str, gone: Gone) -> bool:
    """Groups are lines of JSON (facepipe/reports/html.py): faces leave them, groups without a face leave the page.

    Rows of a page's tables leave it as well; one that tells of the erased elsewhere is deleted.
    """
    with open(path, encoding="utf-8", newline="") as file:
        head, line = _before_groups(file)
        scrubbed = _Groups(gone, head)
        with open(path + ".new", "w", encoding="utf-8", newline="") as out:
            out.write(_table_rows(head, gone))
            while line.removeprefix(",").startswith(_GROUP):
                out.write(scrubbed.line(line))
                line = file.readline()
            tail = line + file.read()
            out.write(_TOTAL.sub(lambda found: f"{found[1]}{int(found[2]) - scrubbed.dropped}", tail))
    rest = _table_rows(head, gone) + tail
    if not gone.uris.isdisjoint(text for found in _TEXT.findall(rest) for text in _shown(found)):
        os.unlink(path + ".new")
        os.unlink(path)
        return True
    return put_in_place(path, scrubbed.changed or _table_rows(head, gone) != head)


def _before_groups(file: Iterable[str]) -> tuple[str, str]:
    """(what comes before the groups, the first group's line; empty where there is none)."""
    head: list[str] = []
    for line in file:
        if line.startswith(_GROUP):
            return "".join(head), line
        head.append(line)
    return "".join(head), ""


def _shown(text: str) -> tuple[str, str]:
    """Text of a page as it stands there, and as it was where something in it is spelt out."""
    plain = unescape(text)
    return plain, _SPELT.sub(lambda found: chr(int(found[1], 16)), plain)


def _table_rows(head: str, gone: Gone) -> str:
    """The page's head without rows of tables that name the erased."""
    names = gone.names | gone.uris

    def row(found: re.Match[str]) -> str:
        cells = _CELL.findall(found[0])[:2]  # who is here, and who is there
        return "" if not names.isdisjoint(text for cell in cells for text in _shown(cell)) else found[0]

    return _SHARED.sub(lambda table: _TABLE_ROW.sub(row, table[0]), head)


class _Groups:
    """The groups of a page, one after the other."""

    def __init__(self, gone: Gone, head: str):
        title = _TITLE.search(head)
        self._gone = gone
        self._names = frozenset() if title and title["title"] in _NAMELESS else gone.names
        self._first, self.changed, self.dropped = True, False, 0

    def line(self, line: str) -> str:
        """The line anew; nothing where the group has to go."""
        body = line.removeprefix(",")
        before = json.loads(body)
        group = self._scrubbed(before)
        self.changed |= group != before
        self.dropped += group is None
        if group is None:
            return ""
        comma, self._first = "" if self._first else ",", False
        return comma + (body if group == before else _json(group) + "\n")

    def _scrubbed(self, group: dict[str, Any]) -> dict[str, Any] | None:
        """The group without the erased; None where nothing is left of it, or its words are about them."""
        if not self._names.isdisjoint(_names_in(group["title"])):
            return None
        faces = [face for face in group["faces"] if not self._speaks_of(face)]
        figures = [figure for figure in group["figures"] if figure[0] not in self._names]
        return {**group, "figures": figures, "faces": faces} if faces else None

    def _speaks_of(self, face: dict[str, Any]) -> bool:
        labels = (value for name, value in face.get("figures", ()) if name == "label")
        return face["uri"] in self._gone.uris or any(label in self._gone.names for label in labels)


def _names_in(title: str) -> Iterator[str]:
    """What may be a label in a title such as `A: two persons?` or `A and B: one person?`."""
    for colon in re.finditer(":|$", title):
        head = title[: colon.start()]
        yield head
        for place in re.finditer(" and ", head):
            yield from (head[: place.start()], head[place.end() :])


def _json(value: Any) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
