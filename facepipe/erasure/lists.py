"""Lists of reports without erased data: lines of text, rows of CSV."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator

from facepipe.erasure.erased_data import ANY, COMPARED, NAMES, ErasedData, find_role
from facepipe.storage.atomic import write_beside
from facepipe.text import restore_cell


def scrub_list(path: str, erased: ErasedData) -> bool:
    """Remove lines that name an erased image; return whether there were any."""
    read_line = create_line_reader(path)
    return _filter_lines(path, lambda line: not erased.uris.isdisjoint(read_line(line)))


def create_line_reader(path: str) -> Callable[[str], Iterable[str]]:
    """Create a function that returns what a line of a list may say of an image.

    That is its uri, with or without a number behind it. Uris in msceleb.txt lack a common root.
    """
    # Only this list has short paths, so that only here a root is put before them.
    root = _find_root(os.path.dirname(path)) if os.path.basename(path) == "msceleb.txt" else ""

    def read_line(line: str) -> Iterator[str]:
        text = line.rstrip("\r\n")
        # The line may be a uri, or a uri and a number.
        for uri in (text, text.rpartition(" ")[0]):
            yield uri
            yield root + uri

    return read_line


def _find_root(folder: str) -> str:
    """Find what the paths of msceleb.txt are relative to: clean.txt has the same lines in full."""
    try:
        with (
            open(os.path.join(folder, "clean.txt"), encoding="utf-8", errors="surrogateescape") as full_lines,
            open(os.path.join(folder, "msceleb.txt"), encoding="utf-8", errors="surrogateescape") as short_lines,
        ):
            # The first line that ends alike tells the root, which is the same for all lines.
            for full, short in zip(full_lines, short_lines, strict=False):
                if full != short and full.endswith(short):
                    return full.removesuffix(short)
    except OSError:
        pass
    return ""


def _filter_lines(path: str, is_dropped: Callable[[str], bool]) -> bool:
    """Rewrite a file without some lines; return whether lines were dropped."""
    dropped = 0
    # The file is copied line by line beside the old one, because it may be as long as the gallery.
    with (
        write_beside(path) as unfinished,
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        with open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            for line in file:
                if is_dropped(line):
                    dropped += 1
                else:
                    out.write(line)
        # A list without such lines stays as it was.
        if not dropped:
            os.unlink(unfinished)
    return dropped > 0


def scrub_csv(path: str, erased: ErasedData) -> bool:
    """Remove rows that name erased data, and comparisons with it; return whether there were any.

    The file is read as CSV, because a label may span several lines.
    """
    compared = None  # position of the column that only compares
    is_changed = False
    with (
        write_beside(path) as unfinished,
        open(path, encoding="utf-8", errors="surrogateescape", newline="") as file,
    ):
        with open(unfinished, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
            writer = csv.writer(out)
            # A row goes if one of its cells holds erased data of that cell's role.
            for roles, row in iterate_csv_rows(file):
                if COMPARED in row and not any(roles):
                    compared = row.index(COMPARED)
                cells = [restore_cell(cell) for cell in row]
                # A comparison with the erased is emptied, and the row of the other person stays.
                if compared is not None and not erased.by_role[NAMES].isdisjoint(cells[compared : compared + 1]):
                    is_changed = True
                    row[compared] = ""
                    cells[compared] = ""
                if any(role and cell in erased.by_role[role] for role, cell in zip(roles, cells, strict=False)):
                    is_changed = True
                else:
                    writer.writerow(row)
        if not is_changed:
            os.unlink(unfinished)
    return is_changed


def iterate_csv_rows(file: Iterable[str]) -> Iterator[tuple[list[str | None], list[str]]]:
    """Read a CSV file row by row.

    If a column is unknown, facepipe did not write the file, and any cell may reveal somebody.

    Returns:
        Pairs of the roles of the cells and the cells. The header of one of facepipe's files reveals nobody.
    """
    reader = csv.reader(file)
    header = next(reader, None)
    if header is None:
        return
    # One unknown column means that another program wrote the file.
    roles = [find_role(name) for name in header]
    is_ours = ANY not in roles
    if is_ours:
        yield [None] * len(header), header
    else:
        yield [ANY] * len(header), header
    for row in reader:
        yield (roles if is_ours else [ANY] * len(row)), row
