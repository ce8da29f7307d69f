"""Lists of reports without the erased: lines of text, rows of CSV."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator

from facepipe.erasure.erased_data import ANY, ErasedData, find_role
from facepipe.storage.atomic import publish_file


def scrub_list(path: str, gone: ErasedData) -> bool:
    told = create_line_reader(path)
    return _filter_lines(path, lambda line: not gone.uris.isdisjoint(told(line)))


def create_line_reader(path: str) -> Callable[[str], Iterable[str]]:
    """What a line of a list may say of an image: its uri, with or without a number behind it."""
    root = _find_root(os.path.dirname(path)) if os.path.basename(path) == "msceleb.txt" else ""

    def told(line: str) -> Iterator[str]:
        text = line.rstrip("\r\n")
        for uri in (text, text.rpartition(" ")[0]):
            yield uri
            yield root + uri

    return told


def _find_root(folder: str) -> str:
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


def _filter_lines(path: str, drop: Callable[[str], bool]) -> bool:
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
    return finish_file(path, written < count)


def finish_file(path: str, changed: bool) -> bool:
    if changed:
        publish_file(path + ".new", path, sync=False)
    else:
        os.unlink(path + ".new")
    return changed


def scrub_csv(path: str, gone: ErasedData) -> bool:
    """Rows as CSV has them: a label may go over several lines."""
    with (
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
        open(path + ".new", "w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        rows, writer, changed = iterate_csv_rows(file), csv.writer(out), False
        for roles, row in rows:
            if any(role and cell in gone.by_role[role] for role, cell in zip(roles, row, strict=False)):
                changed = True
            else:
                writer.writerow(row)
    return finish_file(path, changed)


def iterate_csv_rows(file: Iterable[str]) -> Iterator[tuple[list[str | None], list[str]]]:
    """(what each cell holds, the cells) of each row; the row of column names holds nothing."""
    reader = csv.reader(file)
    head = next(reader, None)
    if head is None:
        return
    named = [find_role(name) for name in head]
    ours = ANY not in named
    yield ([None] * len(head), head) if ours else ([ANY] * len(head), head)
    for row in reader:
        yield (named if ours else [ANY] * len(row)), row
