"""Read the protocols of IJB-B and IJB-C, in the files of insightface's test suite."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from facepipe.errors import EvaluationError
from facepipe.types import Bool, Float32, Int64

_TEMPLATES = "_face_tid_mid.txt"
_PAIRS = "_template_pair_label.txt"
_SCORES = "_name_5pts_score.txt"
_GALLERIES = ("_1N_gallery_G1.csv", "_1N_gallery_G2.csv")
_PROBES = "_1N_probe_mixed.csv"
_POINTS = 10
_EXAMPLES = 3


@dataclass(frozen=True)
class TemplateImages:
    """The images of the templates. A template is a set of images of one person, from photos and videos.

    Attributes:
        names: Name of each image, (n,).
        templates: Its template, (n,).
        media: Its photo or video, (n,): frames of one video count as one.
        scores: Score of its face by the detector of the protocol, (n,); 1 if there is no such file.
    """

    names: list[str]
    templates: Int64
    media: Int64
    scores: Float32


@dataclass(frozen=True)
class TemplatePairs:
    """Pairs of templates.

    Attributes:
        left: Template, (n,).
        right: Template, (n,).
        same: Whether both are of one person, (n,).
    """

    left: Int64
    right: Int64
    same: Bool


@dataclass(frozen=True)
class Subjects:
    """Templates and who they are.

    Attributes:
        templates: Each template once, (n,).
        subjects: Its person, (n,).
    """

    templates: Int64
    subjects: Int64


@dataclass(frozen=True)
class TemplateProtocol:
    """What a folder of such files holds.

    Attributes:
        images: The images of all templates.
        pairs: Pairs of the 1:1 protocol; None without their file.
        galleries: Enrolled templates of the 1:N protocol, by the gallery; empty without their files.
        probes: Searched templates of the 1:N protocol; None without their file.
    """

    images: TemplateImages
    pairs: TemplatePairs | None
    galleries: list[Subjects]
    probes: Subjects | None


def read_template_protocol(folder: str) -> TemplateProtocol:
    """Read the files of a folder such as `IJBC/meta`.

    Raises:
        EvaluationError: A file is missing, or a line of it is not what it should be.
    """
    images = _read_images(folder)
    pairs_file = _find_file(folder, _PAIRS)
    probes_file = _find_file(folder, _PROBES)
    galleries = [path for path in (_find_file(folder, ending) for ending in _GALLERIES) if path is not None]
    if pairs_file is None and (probes_file is None or not galleries):
        raise EvaluationError(f"{folder!r} holds neither *{_PAIRS} (1:1) nor *{_GALLERIES[0]} and *{_PROBES} (1:N)")
    known = np.unique(images.templates)
    pairs = None if pairs_file is None else _read_pairs(pairs_file, known)
    probes = None if probes_file is None else _read_subjects(probes_file, known)
    return TemplateProtocol(images, pairs, [_read_subjects(path, known) for path in galleries], probes)


def _read_images(folder: str) -> TemplateImages:
    path = _find_file(folder, _TEMPLATES)
    if path is None:
        raise EvaluationError(f"{folder!r} holds no *{_TEMPLATES}: name the folder `meta` of IJB-B or IJB-C")
    table = _read_table(path, {"name": pa.string(), "template": pa.int64(), "media": pa.int64()}, " ")
    names = [os.path.splitext(name)[0] for name in table["name"].to_pylist()]
    scores = np.ones(len(names), np.float32)
    scores_file = _find_file(folder, _SCORES)
    if scores_file is not None:
        columns = {"name": pa.string(), **{f"p{n}": pa.float32() for n in range(_POINTS)}, "score": pa.float32()}
        scored = _read_table(scores_file, columns, " ")
        by_name = dict(zip(scored["name"].to_pylist(), scored["score"].to_pylist(), strict=True))
        found = [by_name.get(name) for name in table["name"].to_pylist()]
        if None in found:
            raise EvaluationError(f"{scores_file}: no score of {table['name'][found.index(None)]}, which {path} names")
        scores = np.array(found, np.float32)
    return TemplateImages(names, _to_numbers(table["template"]), _to_numbers(table["media"]), scores)


def _read_pairs(path: str, known: Int64) -> TemplatePairs:
    table = _read_table(path, {"left": pa.int64(), "right": pa.int64(), "same": pa.int64()}, " ")
    same = _to_numbers(table["same"])
    if not np.isin(same, (0, 1)).all():
        raise EvaluationError(f"{path}: the third field of a line must be 0 or 1")
    pairs = TemplatePairs(_to_numbers(table["left"]), _to_numbers(table["right"]), same.astype(bool))
    _require_known(path, known, np.concatenate([pairs.left, pairs.right]))
    return pairs


def _read_subjects(path: str, known: Int64) -> Subjects:
    """Read a CSV file whose first columns are template and subject; a template has a line per image."""
    with open(path, "rb") as file:
        header = file.readline().decode("utf-8-sig", "replace").strip().split(",")
    columns = {f"c{n}": pa.int64() if n < 2 else pa.string() for n in range(len(header))}
    table = _read_table(path, columns, ",", skip=1)
    templates, first = np.unique(_to_numbers(table["c0"]), return_index=True)
    _require_known(path, known, templates)
    return Subjects(templates, _to_numbers(table["c1"])[first])


def _require_known(path: str, known: Int64, templates: Int64) -> None:
    missing = np.setdiff1d(templates, known)
    if len(missing):
        shown = ", ".join(map(str, missing[:_EXAMPLES]))
        raise EvaluationError(f"{path}: {len(missing)} templates have no image in *{_TEMPLATES}, such as {shown}")


def _find_file(folder: str, ending: str) -> str | None:
    try:
        names = sorted(name for name in os.listdir(folder) if name.lower().endswith(ending.lower()))
    except OSError as error:
        raise EvaluationError(f"cannot read {folder!r}: {error}") from error
    if len(names) > 1:
        raise EvaluationError(f"{folder!r} holds {len(names)} files *{ending}: keep those of one set in a folder")
    return os.path.join(folder, names[0]) if names else None


def _read_table(path: str, columns: dict[str, Any], delimiter: str, skip: int = 0) -> pa.Table:
    try:
        return pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(column_names=list(columns), skip_rows=skip),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter),
            convert_options=pyarrow.csv.ConvertOptions(column_types=columns),
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise EvaluationError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _to_numbers(column: pa.ChunkedArray) -> Int64:
    if column.null_count:
        raise EvaluationError("a line of the protocol lacks a number")
    return np.asarray(column.to_numpy(), np.int64)
