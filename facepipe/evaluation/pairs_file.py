"""Read pairs files: those of LFW, RFW, CPLFW, CALFW, AgeDB and CFP, CSV with two file columns, insightface's `.bin`."""

import csv
import io
import os
import re
from typing import NamedTuple

from facepipe.errors import EvaluationError, StorageError
from facepipe.sources.containers.verification_set import name_image, read_verification_set
from facepipe.sources.extensions import IMAGE_EXTENSIONS, VERIFICATION_EXTENSION, get_extension

# Names of the columns that are understood; the first ones that a file has count.
_FILE_COLUMNS = (("file_x", "file_y"), ("a", "b"), ("left", "right"), ("image1", "image2"), ("img1", "img2"))
_SAME_COLUMNS = ("same", "issame", "label", "decision", "match")
_TRUE = ("1", "true", "yes", "same")
_FALSE = ("0", "false", "no", "different")
FOLDS = 10


class Pair(NamedTuple):
    """Two images to compare.

    Attributes:
        left: End of the first image's path, without extension.
        right: End of the second image's path, without extension.
        same: Whether they show one person.
        fold: Number of the fold.
    """

    left: str
    right: str
    same: bool
    fold: int


def holds_images(path: str) -> bool:
    """Tell from its name whether a file of pairs holds their images too: a `.bin` of insightface, of aligned crops."""
    return get_extension(path) == VERIFICATION_EXTENSION


def read_pairs(path: str | os.PathLike[str]) -> list[Pair]:
    """Read the pairs of a file, or of CFP's folder `Protocol/Split/FP` or `FF`.

    The images of a `.bin` are named as in a gallery of it: `lfw.bin/000000`.

    Raises:
        EvaluationError: if the file or a line of it cannot be read.
    """
    if holds_images(os.fspath(path)):
        return _read_verification_pairs(os.fspath(path))
    if os.path.isdir(path):
        return _read_cfp(os.fspath(path))
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read the pairs file {os.fspath(path)!r}: {error}") from error
    # Other separators that `splitlines` knows may be part of a name.
    lines = re.split(r"\r\n|\r|\n", text.rstrip("\r\n"))
    if not text.strip():
        raise EvaluationError(f"the pairs file {os.fspath(path)!r} is empty")
    # The first line of LFW's file is one or two numbers, and that of a CSV a header.
    first = lines[0].split()
    if len(first) in (1, 2) and all(word.isdigit() for word in first):
        return _parse_lfw(lines, os.fspath(path))
    if len(first) in (3, 4) and all(word.isdigit() for word in (first[1], first[2] if len(first) == 3 else first[3])):
        # RFW's files are LFW's without the first line.
        per_fold = max(1, -(-len(lines) // FOLDS))
        return [pair._replace(fold=n // per_fold) for n, pair in enumerate(_parse_lfw_lines(lines, os.fspath(path), 1))]
    if _is_image(first[0]) and len(first) == 2 and first[1].isdigit():
        return _parse_two_lines(lines, os.fspath(path))
    if len(first) == 3 and sum(map(_is_image, first)) == 2 and any(word in ("0", "1", "-1") for word in first):
        return _parse_two_images(lines, os.fspath(path))
    return _parse_csv(text, os.fspath(path))


def _is_image(word: str) -> bool:
    return get_extension(word) in IMAGE_EXTENSIONS


def _cut_folds(pairs: list[Pair]) -> list[Pair]:
    """Cut pairs into ten folds of consecutive ones."""
    per_fold = max(1, -(-len(pairs) // FOLDS))
    return [pair._replace(fold=n // per_fold) for n, pair in enumerate(pairs)]


def _parse_two_lines(lines: list[str], path: str) -> list[Pair]:
    """Parse CPLFW's and CALFW's format: a pair is two lines of an image and a number, 0 if they are two persons.

    In CALFW the number of a pair of one person may be its fold.
    """
    images = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not fields[1].isdigit():
            raise EvaluationError(f"{path}, line {number}: an image and a number expected: {line[:200]!r}")
        images.append((to_image_name(fields[0]), int(fields[1]), number))
    if len(images) % 2:
        raise EvaluationError(f"{path}: {len(images)} images, of which two make a pair: the last line is missing")
    pairs = []
    for left, right in zip(images[::2], images[1::2], strict=True):
        if bool(left[1]) != bool(right[1]):
            raise EvaluationError(f"{path}, line {right[2]}: {right[1]} after {left[1]}: a pair has one number")
        pairs.append(Pair(left[0], right[0], left[1] != 0, 0))
    return _cut_folds(pairs)


def _parse_two_images(lines: list[str], path: str) -> list[Pair]:
    """Parse lines of two images and 1 or 0 (or -1) before or after them, as AgeDB's and others are handed out."""
    pairs = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        images = [field for field in fields if _is_image(field)]
        flags = [field for field in fields if not _is_image(field)]
        if len(images) != 2 or len(flags) != 1 or flags[0] not in ("0", "1", "-1"):
            raise EvaluationError(f"{path}, line {number}: two images and 1 or 0 expected: {line[:200]!r}")
        pairs.append(Pair(to_image_name(images[0]), to_image_name(images[1]), flags[0] == "1", 0))
    return _cut_folds(pairs)


def _read_cfp(folder: str) -> list[Pair]:
    """Read CFP's protocol: ten folders of `same.txt` and `diff.txt`, with numbers of images in two lists."""
    base = os.path.dirname(os.path.dirname(os.path.abspath(folder)))
    kinds = os.path.basename(os.path.abspath(folder)).upper()
    if kinds not in ("FP", "FF"):
        raise EvaluationError(f"{folder!r} is not a pairs file, nor CFP's folder Protocol/Split/FP or FF")
    frontal = _read_cfp_list(os.path.join(base, "Pair_list_F.txt"))
    other = frontal if kinds == "FF" else _read_cfp_list(os.path.join(base, "Pair_list_P.txt"))
    pairs = []
    for fold in range(FOLDS):
        for name, is_same in (("same.txt", True), ("diff.txt", False)):
            path = os.path.join(folder, f"{fold + 1:02d}", name)
            for number, line in enumerate(_read_lines(path), 1):
                fields = line.split(",")
                try:
                    left, right = (int(field) for field in fields)
                    pairs.append(Pair(frontal[left], other[right], is_same, fold))
                except (ValueError, KeyError) as error:
                    raise EvaluationError(
                        f"{path}, line {number}: two numbers of the lists expected: {line[:200]!r}"
                    ) from error
    return pairs


def _read_cfp_list(path: str) -> dict[int, str]:
    """Read lines of a number and a path, such as `1 ../Data/Images/001/frontal/01.jpg`."""
    images = {}
    for number, line in enumerate(_read_lines(path), 1):
        index, _, image = line.strip().partition(" ")
        parts = to_image_name(image).split("/")
        if not index.isdigit() or len(parts) < 3:
            raise EvaluationError(f"{path}, line {number}: a number and a path expected: {line[:200]!r}")
        images[int(index)] = "/".join(parts[-3:])
    return images


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [line for line in file.read().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"cannot read {path!r}: {error}") from error


def _read_verification_pairs(path: str) -> list[Pair]:
    """Read the pairs of a verification set, in ten folds of consecutive pairs as insightface does."""
    try:
        with open(path, "rb") as file:
            same = read_verification_set(file).same
    except (OSError, StorageError) as error:
        raise EvaluationError(f"cannot read the pairs of {path!r}: {error}") from error
    name = os.path.basename(path)
    return [
        Pair(f"{name}/{name_image(2 * n)}", f"{name}/{name_image(2 * n + 1)}", is_same, n * FOLDS // len(same))
        for n, is_same in enumerate(same)
    ]


def _parse_lfw(lines: list[str], path: str) -> list[Pair]:
    """Parse LFW's format.

    View 2 begins with `FOLDS N`; each fold has N lines `name i j` and N lines `name i name j`. View 1 begins with `N`
    and has one fold.
    """
    words = [int(word) for word in lines[0].split()]
    # Each fold has N pairs of one person and N of two.
    per_fold = 2 * words[-1]
    pairs = [
        pair._replace(fold=n // per_fold) for n, pair in enumerate(_parse_lfw_lines(lines[1:], path, first_number=2))
    ]
    folds = words[0] if len(words) == 2 else 1
    if len(pairs) != folds * per_fold:
        raise EvaluationError(f"{path} announces {folds} folds of {per_fold} pairs and holds {len(pairs)} pairs")
    return pairs


def _parse_lfw_lines(lines: list[str], path: str, first_number: int) -> list[Pair]:
    """Parse lines `name i j` and `name i name j`, all into fold 0."""
    pairs: list[Pair] = []
    for number, line in enumerate(lines, first_number):
        # A name may hold spaces if tabs separate the fields.
        fields = line.split("\t") if "\t" in line else line.split()
        try:
            match fields:
                case [name, i, j]:
                    pairs.append(Pair(_build_lfw_name(name, i), _build_lfw_name(name, j), True, 0))
                case [name, i, other, j]:
                    pairs.append(Pair(_build_lfw_name(name, i), _build_lfw_name(other, j), False, 0))
                case []:
                    continue
                case _:
                    raise ValueError("3 or 4 fields expected")
        except ValueError as error:
            raise EvaluationError(f"{path}, line {number}: {error}: {line!r}") from error
    return pairs


def _build_lfw_name(name: str, number: str) -> str:
    return f"{name}/{name}_{int(number):04d}"


def _parse_csv(text: str, path: str) -> list[Pair]:
    """Parse a CSV file with a header, into ten folds of consecutive rows."""
    # Read as one text, because a quoted name may hold a line break.
    rows = list(csv.DictReader(io.StringIO(text, newline=None)))
    # The file's own column names, by their lower-case form.
    names = {(name or "").strip().lower(): name for name in (rows[0] if rows else {})}
    files = next((pair for pair in _FILE_COLUMNS if all(name in names for name in pair)), None)
    same = next((name for name in _SAME_COLUMNS if name in names), None)
    if files is None or same is None:
        raise EvaluationError(
            f"{path} is neither LFW's pairs.txt, nor a .bin, nor a CSV with columns file_x, file_y, same; "
            f"its first line is {text.splitlines()[0][:80]!r}"
        )
    # Ten folds, the last one perhaps smaller. Line numbers begin at 2, behind the header.
    fold_size = -(-len(rows) // FOLDS)
    left, right = files
    return [
        Pair(
            left=to_image_name(row[names[left]]),
            right=to_image_name(row[names[right]]),
            same=_parse_same(row[names[same]], path, line),
            fold=(line - 2) // fold_size,
        )
        for line, row in enumerate(rows, 2)
    ]


def to_image_name(name: str) -> str:
    """Return the name of an image that a cell of a pairs file names: the end of its path, without extension."""
    name = (name or "").strip().replace("\\", "/").removeprefix("./")
    return os.path.splitext(name)[0] if get_extension(name) in IMAGE_EXTENSIONS else name


def _parse_same(text: str, path: str, line: int) -> bool:
    word = (text or "").strip().lower()
    if word not in _TRUE + _FALSE:
        raise EvaluationError(f"{path}, line {line}: `same` is {text!r}, expected 1 or 0")
    return word in _TRUE
