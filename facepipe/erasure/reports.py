"""Reports without the erased: rows, lines of lists, faces on pages, vectors; what cannot be mended is deleted.

What a column holds is told by its name, so that a label that is also a word of ours ("keep", "12") takes nothing of
others along.
"""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from html import unescape
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from facepipe.clusters.ledger import Ledger
from facepipe.clusters.standing import MARK, SUMS, Standing, forget
from facepipe.clusters.tables import FACES
from facepipe.erasure.selection import mark_of
from facepipe.errors import StorageError
from facepipe.gallery.lock import NAME
from facepipe.gallery.mirror import PRIVATE

URIS, NAMES, CONTENTS, IDS, ANY = "uris", "names", "contents", "ids", "any"
_ROLES = (
    (re.compile(r"uri.*|kept_uri|path"), URIS),
    (re.compile(r"(nearest_)?identity.*|suggested|left|right"), NAMES),
    (re.compile(r"image_id.*"), CONTENTS),
    (re.compile(r"face_id.*|medoid"), IDS),
    (re.compile(r"decision|reason|kind|label|probability"), None),  # words and numbers of ours
)
_ASIDE = "nearest_identity"  # only compared with: the row is another's, and stays without it
_GROUP = '{"title":'
_TITLE = re.compile(r"<title>(?P<title>[^<]*)</title>")
_NAMELESS = ("Identity clusters", "Duplicate images", "What two galleries share")  # pages whose titles name nobody
_SHARED = re.compile(r"<table>\s*<caption>Shared identities.*?</table>", re.DOTALL)
_TABLE_ROW = re.compile(r"[ \t]*<tr><td.*?</tr>\n?", re.DOTALL)
_CELL = re.compile(r"<td[^>]*>([^<]*)</td>")
_TEXT = re.compile(r">([^<]+)<")
_SPELT = re.compile(r"\\u\{([0-9a-f]+)\}")  # how pages show what would hide
_TOTAL = re.compile(r'(id="summary">\{"total":)(\d+)')
_WORDS = re.compile(rb"[^\s\"'<>,;\x00]+")
_DAMAGED = (pa.ArrowException, ValueError, KeyError, TypeError, EOFError, BadZipFile, csv.Error)


@dataclass(frozen=True)
class Gone:
    """What must not be left. names: labels that no image bears any more; faces: sorted ids; marks: sorted `mark_of` of
    the vectors."""

    uris: frozenset[str]
    names: frozenset[str]
    contents: frozenset[str]
    faces: npt.NDArray[np.int64]
    marks: npt.NDArray[np.uint64]

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


def role_of(column: str) -> str | None:
    """What a column, or a field of a list, holds; None where nobody can be told by it."""
    return next((role for pattern, role in _ROLES if pattern.fullmatch(column)), ANY)


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
        elif name.endswith(".new") and not name.startswith(NAME):
            _unlink(path)  # of a run that died
        elif not name.startswith(NAME) and name not in PRIVATE and here.scrub(name):
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
        counts = Ledger(os.path.join(folder, FACES)).counts()
        known = Standing.load(folder, counts)
    except (StorageError, *_DAMAGED):
        for name in (SUMS, MARK):
            _unlink(os.path.join(folder, name))
        return True
    if known is not None and not len(known[1]):
        return False
    forget(folder, counts)
    return True


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot delete {path!r}: {error.strerror}") from error


class _Report:
    """The files of one report."""

    def __init__(self, folder: str, gone: Gone):
        self._folder, self._gone = folder, gone

    @cached_property
    def _listed(self) -> Gone:
        """What must not be in lists and pages: images that were to go for a copy that is erased are wanted again."""
        path = os.path.join(self._folder, "decisions.parquet")
        try:
            wanted = list(_orphans(path, self._gone))
        except (OSError, *_DAMAGED):  # it is no table of copies, or is deleted below
            wanted = []
        return replace(self._gone, uris=self._gone.uris.union(*wanted))

    def scrub(self, name: str) -> bool:
        """Whether the file was changed or deleted. One that is damaged goes: whatever is in it, it is not left."""
        path, kind = os.path.join(self._folder, name), os.path.splitext(name)[1]
        if name == SUMS:
            return False  # with the tables
        tables: dict[str, Callable[[str, Gone], bool]] = {".parquet": _table, ".npz": _arrays, ".json": _json_file}
        lists: dict[str, Callable[[str, Gone], bool]] = {".txt": _list, ".csv": _csv, ".html": _page}
        try:
            if kind in lists:
                return lists[kind](path, self._listed)
            return tables.get(kind, _unknown)(path, self._gone)
        except OSError as error:
            if error.errno is not None:  # Arrow's own have none
                raise StorageError(f"cannot clean the report {path!r}: {(error.strerror or '').lower()}") from error
        except _DAMAGED:
            pass
        for left in (path, path + ".new"):
            _unlink(left)
        return True


def _orphans(path: str, gone: Gone) -> Iterator[list[str]]:
    with pq.ParquetFile(path) as file:
        if {"uri", "kept_uri"} <= set(file.schema_arrow.names):
            for batch in file.iter_batches(columns=["uri", "kept_uri"]):
                yield batch.filter(pc.is_in(batch["kept_uri"], gone.arrays[URIS]))["uri"].to_pylist()


# ------------------------------------------------------------------ tables


def _table(path: str, gone: Gone) -> bool:
    """Batch by batch: a table may have as many rows as the gallery has faces."""
    with pq.ParquetFile(path) as file:
        columns = [field.name for field in file.schema_arrow if _told_by(field) or field.name == "size"]
        if not columns or not any(_touched(batch, gone) for batch in file.iter_batches(columns=columns)):
            return False
        with pq.ParquetWriter(path + ".new", file.schema_arrow, compression="zstd") as writer:
            for batch in file.iter_batches():
                writer.write_batch(_without(batch, gone))
    os.replace(path + ".new", path)
    return True


def _told_by(field: pa.Field) -> str | None:
    """What a column of a table is looked at for."""
    role = role_of(field.name)
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return role if role != IDS else ANY
    return role if role == IDS and pa.types.is_int64(field.type) else None


def _found(batch: pa.RecordBatch, gone: Gone, aside: bool) -> npt.NDArray[np.bool_]:
    mask = np.zeros(batch.num_rows, bool)
    for field, column in zip(batch.schema, batch.columns, strict=True):
        role = _told_by(field)
        if role is not None and (field.name == _ASIDE) == aside:
            values = gone.arrays[role]
            mask |= pc.is_in(column, values.cast(field.type)).to_numpy(zero_copy_only=False)
    if not aside and {"medoid", "size"} <= set(batch.schema.names):  # a cluster that lost all is named by who is gone
        mask |= pc.equal(batch["size"], 0).to_numpy(zero_copy_only=False)
    return mask


def _touched(batch: pa.RecordBatch, gone: Gone) -> bool:
    return bool(_found(batch, gone, False).any() or _found(batch, gone, True).any())


def _without(batch: pa.RecordBatch, gone: Gone) -> pa.RecordBatch:
    kept = batch.filter(pa.array(~_found(batch, gone, False)))
    compared = _found(kept, gone, True)
    if compared.any():
        at = kept.schema.get_field_index(_ASIDE)
        kept = kept.set_column(at, kept.schema.field(at), pc.if_else(pa.array(compared), None, kept.column(at)))
    return kept


def _arrays(path: str, gone: Gone) -> bool:
    """Named arrays: rows of two-dimensional ones that are vectors of the erased leave."""
    with open(path, "rb") as file, np.load(file) as held:
        arrays = {name: held[name] for name in held.files}
    kept = {}
    for name, array in arrays.items():
        vectors = array.ndim == 2 and array.dtype == np.float32 and array.shape[1] >= 2
        kept[name] = array[~np.isin(mark_of(array), gone.marks)] if vectors else array
    if all(len(kept[name]) == len(array) for name, array in arrays.items() if array.ndim):
        return False
    with open(path + ".new", "wb") as out:
        np.savez(out, **kept)
    os.replace(path + ".new", path)
    return True


# ------------------------------------------------------------------ lists


def _list(path: str, gone: Gone) -> bool:
    told = line_tests(path)
    return _filtered(path, lambda line: not gone.uris.isdisjoint(told(line)))


def line_tests(path: str) -> Callable[[str], Iterable[str]]:
    """What a line of a list may say of an image: its uri, with or without a number behind it."""
    root = _root(os.path.dirname(path)) if os.path.basename(path) == "msceleb.txt" else ""

    def told(line: str) -> Iterator[str]:
        text = line.rstrip("\r\n")
        for uri in (text, text.rpartition(" ")[0]):
            yield uri
            yield root + uri

    return told


def _root(folder: str) -> str:
    """What the paths of msceleb.txt are relative to: clean.txt has the same lines in full."""
    try:
        with (
            open(os.path.join(folder, "clean.txt"), encoding="utf-8", errors="surrogateescape") as whole,
            open(os.path.join(folder, "msceleb.txt"), encoding="utf-8", errors="surrogateescape") as short,
        ):
            for full, part in zip(whole, short, strict=False):
                if full != part and full.endswith(part):
                    return full.removesuffix(part)
    except OSError:
        pass
    return ""


def _filtered(path: str, drop: Callable[[str], bool]) -> bool:
    """Whether lines were dropped."""
    with (
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
        open(path + ".new", "w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        count = written = 0
        for line in file:
            count += 1
            if not drop(line):
                out.write(line)
                written += 1
    return _replaced(path, written < count)


def _replaced(path: str, changed: bool) -> bool:
    if changed:
        os.replace(path + ".new", path)
    else:
        os.unlink(path + ".new")
    return changed


def _csv(path: str, gone: Gone) -> bool:
    """Rows as CSV has them: a label may go over several lines."""
    with (
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
        open(path + ".new", "w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        rows, writer, changed = csv_rows(file), csv.writer(out), False
        for roles, row in rows:
            if any(role and cell in gone.by_role[role] for role, cell in zip(roles, row, strict=False)):
                changed = True
            else:
                writer.writerow(row)
    return _replaced(path, changed)


def csv_rows(file: Iterable[str]) -> Iterator[tuple[list[str | None], list[str]]]:
    """(what each cell holds, the cells) of each row; the row of column names holds nothing."""
    reader = csv.reader(file)
    head = next(reader, None)
    if head is None:
        return
    named = [role_of(name) for name in head]
    ours = ANY not in named
    yield ([None] * len(head), head) if ours else ([ANY] * len(head), head)
    for row in reader:
        yield (named if ours else [ANY] * len(row)), row


# ------------------------------------------------------------------ pages


def _page(path: str, gone: Gone) -> bool:
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
    return _replaced(path, scrubbed.changed or _table_rows(head, gone) != head)


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


# ------------------------------------------------------------------ anything else


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
