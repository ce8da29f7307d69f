"""Identify the people in photos: embed the photos, search their faces in a gallery, write a row per photo and face."""

import csv
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

import facepipe
from facepipe.errors import ConfigError, EvaluationError, SourceError, StorageError
from facepipe.evaluation.identification import choose_threshold
from facepipe.gallery import Gallery
from facepipe.gallery.table import FOLDERS
from facepipe.index.decide import UNKNOWN, DecisionRule
from facepipe.index.identify import ANSWERED_PHOTOS, IDENTIFIED, QUERY_COLUMNS, choose_best_faces, identify_rows
from facepipe.index.lag import measure_lag
from facepipe.index.manifest import open_index_store, require_contract
from facepipe.index.search import Index
from facepipe.models.zoo.registry import find_match_threshold
from facepipe.reports.faces import read_face_details
from facepipe.reports.html import PAGE_MARK, write_report
from facepipe.reports.model import Face, Figure, Group, Report
from facepipe.schema import FAILED
from facepipe.storage import file_exists, is_remote, list_names, open_seekable, read, replace_file, write_file
from facepipe.storage.cache import get_cache_folder
from facepipe.storage.lease import LEASE_FILE, LEASE_GUARD
from facepipe.storage.outputs import write_output
from facepipe.storage.owned import delete_owned_folder
from facepipe.text import protect_cell
from pipelines import embed
from pipelines.embed import EmbedConfig, EmbedSummary
from pipelines.embed.queries import build_query_config
from pipelines.runtime.run_record import record_calls
from pipelines.search.parts import check_place

__all__ = ["IdentifyConfig", "IdentifySummary", "run"]

OnEmbed = Callable[[EmbedSummary], None]

_ENDINGS = (".csv", ".parquet")
_METADATA = b"facepipe.identify"
# Rows that are sorted and written together.
_MAX_SORTED_ROWS = 1_000_000
# Photos that a page shows.
_MAX_GROUPS = 2000


@dataclass(frozen=True)
class IdentifyOptions:
    """Configure how people are identified.

    Attributes:
        threshold: Largest distance that still counts as a match; default: chosen for `fpir`.
        fpir: Rate of false alarms to choose the threshold for, from searches in the gallery itself. Without enough
            labelled faces for it, the model's own threshold is taken.
        decide: Rule for the name: by the nearest face, or by vote of the faces within the threshold.
        recall: recall@10 of the searches; default: the one that the index was built for.
        best_per_photo: One row per photo.
    """

    threshold: Annotated[float, Field(gt=0, le=2)] | None = None
    fpir: Annotated[float, Field(gt=0, lt=1)] = 0.01
    decide: DecisionRule = "nearest"
    recall: Annotated[float, Field(gt=0, le=1)] | None = None
    best_per_photo: bool = False


@dataclass(frozen=True)
class IdentifyConfig:
    """Configure `identify`.

    Attributes:
        identify: How people are identified.
        embed: Settings for the photos; the models are those of the gallery.
    """

    identify: IdentifyOptions = field(default_factory=IdentifyOptions)
    embed: EmbedConfig = field(default_factory=EmbedConfig)


@dataclass
class IdentifySummary:
    """What an identification did.

    Attributes:
        out: File of the answers.
        photos: Photos.
        faces: Faces in them.
        identified: Faces with a name.
        unknown: Faces without one.
        statuses: Photos by status.
        threshold: Largest distance that counted as a match.
        threshold_origin: Where it comes from: given, fpir, or model.
        fpir: Rate of false alarms that it was chosen for; None if it was not.
        fnir: Share of faces of known persons that it misses, as measured in the gallery; None if that is not known.
        embedder: Model.
        table_version: Version of the gallery's table.
        index_version: Version of the table that the index was made from.
        notes: Sentences for the user.
        lacking: Faces of the gallery that the index lacks.
        seconds: Wall clock.
    """

    out: str
    photos: int = 0
    faces: int = 0
    identified: int = 0
    unknown: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    threshold: float = 0.0
    threshold_origin: str = "given"
    fpir: float | None = None
    fnir: float | None = None
    embedder: str = ""
    table_version: int = 0
    index_version: int = 0
    notes: list[str] = field(default_factory=list)
    lacking: int = 0
    seconds: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Describe how the answers came about, for the metadata of the file."""
        names = ("threshold", "threshold_origin", "fpir", "fnir", "embedder", "table_version", "index_version")
        return {"facepipe": facepipe.__version__, **{name: getattr(self, name) for name in names}}


@record_calls("identify")
def run(
    config: IdentifyConfig,
    gallery: str,
    photos: str,
    out: str,
    *,
    keep_queries: str | None = None,
    page: str | None = None,
    on_embed: OnEmbed = lambda summary: None,
) -> IdentifySummary:
    """Identify the people in photos.

    Args:
        config: settings.
        gallery: path or URL of a gallery with an index.
        photos: anything that `embed` takes, or a gallery of photos that were embedded before.
        out: file for the answers: .csv, with its metadata in a file .csv.json beside it, or .parquet.
        keep_queries: folder in which the embedded photos are kept as a gallery; the next call embeds only new ones.
        page: HTML file of the photos' faces beside the matched ones.
        on_embed: called while the photos are embedded.

    Raises:
        ConfigError: the output cannot be taken, or there is no threshold.
        SourceError: no photo could be used.
    """
    began = time.monotonic()
    _check_output(out)
    if page is not None:
        _check_page(page)
    table = Gallery(gallery)
    check_place(out, photos, table.path)
    options = config.identify
    index = Index(table.path, options.recall)
    require_contract(index.manifest, table)
    summary = IdentifySummary(
        out=out,
        embedder=table.contract.embedder,
        table_version=table.version,
        index_version=index.manifest.table_version,
    )
    lag = measure_lag(table, index.manifest, open_index_store(table.path))
    summary.lacking = lag.lacking
    if not lag.is_complete:
        summary.notes.append(lag.describe(gallery))
    _choose_threshold(options, table, summary)
    # All answers are of one state of the index.
    index.freeze()
    with _open_photos(config.embed, table, photos, out, keep_queries, on_embed, has_page=page is not None) as queries:
        answers = _identify(options, index, queries, summary)
        uncertain = _write(answers, out, summary, best_per_photo=options.best_per_photo)
        if page is not None:
            with write_output(page, "page") as path:
                _write_page(path, uncertain, table, queries, summary)
    usable = summary.photos - sum(summary.statuses.get(status, 0) for status in FAILED)
    if not usable:
        raise SourceError(f"none of the {summary.photos} photos could be read: {out} says why of each")
    summary.seconds = round(time.monotonic() - began, 3)
    return summary


def _check_output(out: str) -> None:
    """Refuse an output of another kind, or one that no `identify` wrote."""
    if not out.lower().endswith(_ENDINGS):
        raise ConfigError(f"the answers go into a file: call it .csv or .parquet, not {out!r}")
    if not is_remote(out) and os.path.isdir(out):
        raise ConfigError(f"{out!r} is a folder: choose another name")
    for path in (out, _get_sidecar(out)):
        if path and file_exists(path) and not _is_output(out):
            raise ConfigError(f"{path!r} exists and was not written by `identify`: choose another name")


def _get_sidecar(out: str) -> str:
    """Return the file beside a CSV file that says how its answers came about; empty for Parquet, which holds it."""
    return f"{out}.json" if out.lower().endswith(".csv") else ""


def _is_output(out: str) -> bool:
    """Tell whether a file, with the one beside it, holds answers of `identify`."""
    sidecar = _get_sidecar(out)
    try:
        if sidecar:
            described = json.loads(read(sidecar.encode()))
            return isinstance(described, dict) and {"facepipe", "threshold_origin"} <= set(described)
        with open_seekable(out) as file:
            return _METADATA in (pq.read_schema(file).metadata or {})
    except (OSError, ValueError, StorageError, pa.ArrowException):
        return False


def _check_page(page: str) -> None:
    """Refuse to replace a page that is no report."""
    try:
        with open(page, encoding="utf-8") as file:
            is_report = any(line.startswith(PAGE_MARK) for line in file)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        is_report = False
    if not is_report:
        raise ConfigError(f"{page!r} exists and is no page of facepipe: choose another name")


def _choose_threshold(options: IdentifyOptions, gallery: Gallery, summary: IdentifySummary) -> None:
    """Take the given threshold, else one for the wanted rate of false alarms, else the model's own."""
    if options.threshold is not None:
        summary.threshold = options.threshold
        return
    try:
        point = choose_threshold(gallery, options.fpir, options.recall)
    except EvaluationError as error:
        own = find_match_threshold(gallery.contract.embedder)
        if own is None:
            raise ConfigError(f"no threshold can be chosen ({error}): set one with --threshold") from error
        summary.threshold = own
        summary.threshold_origin = "model"
        summary.notes.append(f"the threshold {own:g} is the model's own, for pairs of faces: {error}")
        return
    summary.threshold = point.threshold
    summary.threshold_origin = "fpir"
    summary.fpir = point.fpir
    summary.fnir = point.fnir
    if point.has_few_alarms:
        summary.notes.append(
            f"the threshold {point.threshold:.4f} rests on only {point.false_alarms} false alarms in {point.probes} "
            "searches, so it is uncertain"
        )


@contextmanager
def _open_photos(
    base: EmbedConfig,
    gallery: Gallery,
    photos: str,
    out: str,
    keep_queries: str | None,
    on_embed: OnEmbed,
    *,
    has_page: bool,
) -> Iterator[Gallery]:
    """Open the photos as a gallery, after embedding those that are new.

    They are embedded into a gallery beside the output, from which an interrupted call goes on, and which is deleted at
    the end unless it is to be kept.
    """
    contract = gallery.contract
    if Gallery.exists(photos):
        queries = Gallery(photos)
        contract.require(queries.contract, "the gallery that is searched")
        yield queries
        return
    needs_thumbs = has_page or keep_queries is not None
    embed_config = build_query_config(base, contract, photos, thumbs=needs_thumbs)
    folder = keep_queries or _get_queries_folder(out)
    if any(True for _ in list_names(folder)) and not Gallery.exists(folder):
        raise ConfigError(f"{folder!r} holds something that is no gallery: choose another folder with --keep-queries")
    embed.run(embed_config, folder, on_embed)
    yield Gallery(folder)
    if keep_queries is None:
        delete_owned_folder(folder, lambda name: name.split("/")[0] in (*FOLDERS, LEASE_FILE, LEASE_GUARD))


def _get_queries_folder(out: str) -> str:
    """Return the folder of the embedded photos: beside the output, or in the cache for one in an object store."""
    return os.path.join(get_cache_folder(out), "queries") if is_remote(out) else f"{out}.queries"


def _identify(options: IdentifyOptions, index: Index, queries: Gallery, summary: IdentifySummary) -> Iterator[pa.Table]:
    """Identify all faces, and count them.

    Yields:
        Answers sorted by photo and face, a million at a time: of most calls that is all of them. The rows of a photo
        are never in two tables.
    """
    statuses: Counter[str] = Counter()
    pending = [IDENTIFIED.empty_table()]
    for batch in queries.batches(QUERY_COLUMNS):
        rows = identify_rows(index, pa.Table.from_batches([batch]), summary.threshold, options.decide)
        people = rows["person"].to_pylist()
        faces = sum(person is not None for person in people)
        unknown = sum(person == UNKNOWN for person in people)
        summary.faces += faces
        summary.unknown += unknown
        summary.identified += faces - unknown
        # Each photo is counted by the row of its first face, or by its only row.
        is_first = [face in (None, 0) for face in rows["face"].to_pylist()]
        statuses.update(status for status, first in zip(rows["status"].to_pylist(), is_first, strict=True) if first)
        # The last photo of a batch may go on in the next one.
        last = pc.equal(rows["photo"], rows["photo"][-1])
        pending.append(rows.filter(pc.invert(last)))
        if sum(part.num_rows for part in pending) > _MAX_SORTED_ROWS and pending[-1].num_rows:
            yield _sort(pending)
            pending = []
        pending.append(rows.filter(last))
    summary.statuses = dict(sorted(statuses.items()))
    summary.photos = sum(statuses.values())
    yield _sort(pending)


def _sort(parts: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(parts).sort_by([("photo", "ascending"), ("face", "ascending")])


def _write(tables: Iterator[pa.Table], out: str, summary: IdentifySummary, *, best_per_photo: bool) -> pa.Table:
    """Write the answers, and how they came about.

    Returns:
        The answers that are the least certain, for a page.
    """
    schema = ANSWERED_PHOTOS if best_per_photo else IDENTIFIED
    uncertain = IDENTIFIED.empty_table()
    is_csv = out.lower().endswith(".csv")
    with _write_file(out) as path:
        writer = _CsvWriter(path, schema) if is_csv else _ParquetWriter(path, schema, summary)
        with closing(writer):
            for table in tables:
                uncertain = _choose_uncertain(pa.concat_tables([uncertain, table]))
                writer.write(choose_best_faces(table) if best_per_photo else table)
    if is_csv:
        with _write_file(_get_sidecar(out)) as path, open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(summary.describe()) + "\n")
    return uncertain


def _choose_uncertain(rows: pa.Table) -> pa.Table:
    """Choose the faces for a page: those with the smallest margin to another person."""
    faces = rows.filter(pc.is_valid(rows["person"]))
    return faces.sort_by([("margin", "ascending"), ("distance", "ascending")]).slice(0, _MAX_GROUPS)


class _ParquetWriter:
    """A Parquet file with the summary in its metadata."""

    def __init__(self, path: str, schema: pa.Schema, summary: IdentifySummary):
        self._schema = schema.with_metadata({_METADATA: json.dumps(summary.describe()).encode()})
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, rows: pa.Table) -> None:
        """Write rows."""
        self._writer.write_table(rows.cast(self._schema))

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()


class _CsvWriter:
    """A CSV file. What a spreadsheet would take for a formula has a quotation mark before it."""

    def __init__(self, path: str, schema: pa.Schema):
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115  close() closes it
        self._writer = csv.writer(self._file)
        self._writer.writerow(schema.names)

    def write(self, rows: pa.Table) -> None:
        """Write rows."""
        for batch in rows.to_batches():
            columns = [_format_column(column) for column in batch.columns]
            self._writer.writerows(zip(*columns, strict=True))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _format_column(column: pa.Array) -> list[object]:
    """Format the cells of a column of a CSV file; empty for null."""
    if pa.types.is_string(column.type):
        return [protect_cell(value or "") for value in column.to_pylist()]
    if pa.types.is_floating(column.type):
        return ["" if value is None else f"{value:.4f}" for value in column.to_pylist()]
    return ["" if value is None else value for value in column.to_pylist()]


@contextmanager
def _write_file(out: str) -> Iterator[str]:
    """Yield the path of a local file that takes the place of the output when it is complete."""
    if not is_remote(out):
        with replace_file(out, what="answers") as path:
            yield path
        return
    folder = get_cache_folder(out)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, os.path.basename(out))
    try:
        yield path
        write_file(out, path)
    finally:
        with suppress(OSError):
            os.unlink(path)


def _write_page(path: str, shown: pa.Table, gallery: Gallery, queries: Gallery, summary: IdentifySummary) -> None:
    """Write a page of the photos' faces, each beside the face that it was matched with; the least certain first."""
    own = read_face_details(queries, shown["query_face_id"].drop_null().to_numpy())
    matched = read_face_details(gallery, shown["matched_face_id"].drop_null().to_numpy())
    groups = [_make_group(row, own, matched) for row in shown.to_pylist()]
    report = Report(
        title="Who is in the photos",
        subtitle=f"{summary.photos} photos, gallery {gallery.path} (version {summary.table_version})",
        figures=(
            Figure("faces", f"{summary.faces:,}"),
            Figure("identified", f"{summary.identified:,}"),
            Figure("Unknown", f"{summary.unknown:,}"),
            Figure("threshold", f"{summary.threshold:.4f}", summary.threshold_origin),
        ),
        groups=groups,
        groups_total=summary.faces,
        notes=tuple(summary.notes),
    )
    write_report(report, path)


def _make_group(row: dict[str, Any], own: dict[int, Any], matched: dict[int, Any]) -> Group:
    """Make the group of a face and the one that it was matched with."""
    face = own.get(row["query_face_id"])
    match = matched.get(row["matched_face_id"])
    faces = [Face(row["photo"], thumb=face.thumb if face else None, badge="photo")]
    if match is not None:
        match_figures = (("distance", f"{row['distance']:.3f}"), ("name", match.identity or ""))
        faces.append(Face(match.uri, match_figures, match.thumb, badge="match"))
    runner_up = "" if row["runner_up"] is None else f"{row['runner_up']} at {row['runner_up_distance']:.3f}"
    figures = (("runner-up", runner_up),) if runner_up else ()
    is_known = row["person"] != UNKNOWN
    return Group(
        title=f"{os.path.basename(row['photo'])}: {row['person']}",
        kind="identified" if is_known else "unknown",
        figures=figures,
        faces=tuple(faces),
        suspicion=1.0 - (row["margin"] or 0.0),
    )
