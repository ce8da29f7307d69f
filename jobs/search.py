"""facepipe search"""

import sys
import time
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from facepipe.errors import ConfigError
from jobs.console import emit, failures, table
from jobs.options import ConfigFile, Detector, Embedder, GalleryPath, Json, Settings, models

_LINE_SECONDS = 5.0


def search(
    gallery: GalleryPath,
    queries: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="QUERIES",
            help="Images (whatever embed takes), a gallery, or Parquet with a column `embedding`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="OUT.parquet", help="The answers; a folder of parts without .parquet.", show_default=False
        ),
    ] = None,
    k: Annotated[int | None, typer.Option("-k", "--k", min=1, help="Nearest faces a query.", show_default="10")] = None,
    radius: Annotated[
        float | None, typer.Option(help="All faces within this distance, instead of k.", show_default=False)
    ] = None,
    recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="Recall@10 to search with.", show_default="the index's")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Distance up to which a face says who it is; else Unknown.", show_default=False),
    ] = None,
    calibrate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FPIR=RATE",
            help="Choose the threshold for this rate of false alarms, from searches in the gallery itself.",
            show_default=False,
        ),
    ] = None,
    decide: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Who it is: by the nearest face, or by vote of the k.", show_default="nearest"),
    ] = None,
    detector: Detector = None,
    embedder: Embedder = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every face instead of visiting lists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find the nearest faces of each query, and say who it is.

    A search that was interrupted goes on from its last finished block when the same command is given again.
    With --calibrate alone, prints the threshold and what it misses.

    Example:

        facepipe search gallery/ new_photos/ hits.parquet

        facepipe search gallery/ queries.parquet hits.parquet -k 50 --recall 0.99

        facepipe search gallery/ --calibrate FPIR=0.001

        facepipe search gallery/ new_photos/ who.parquet --calibrate FPIR=0.001 --decide vote
    """
    with failures():
        from pipelines.search import SearchConfig, run

        given = {"k": k, "radius": radius, "recall": recall, "threshold": threshold, "decide": decide}
        asked = {name: value for name, value in given.items() if value is not None}
        if exact:
            asked["path"] = "scan"
        if calibrate is not None and threshold is not None:
            raise ConfigError("--threshold and --calibrate both set the threshold: give one of them")
        if (queries is None or out is None) and (calibrate is None or queries is not None):
            raise ConfigError("search takes GALLERY QUERIES OUT.parquet; only with --calibrate is GALLERY alone enough")
        point = _calibrated(gallery, calibrate, recall) if calibrate else None
        if point is not None:
            asked["threshold"] = point.threshold
        if queries is None or out is None:
            if as_json and point is not None:
                emit(point.to_dict(), True, lambda: None)
            return
        chosen = {"search": asked, "embed": models(detector, embedder)}
        layers = [read_toml(config) if config else {}, chosen, parse_settings(settings or [])]
        with_progress = _Progress(quiet)
        summary = run(build(SearchConfig, *layers), gallery, queries, out, with_progress)
        emit(asdict(summary), as_json, lambda: _show(summary))


def _calibrated(gallery: str, asked: str, recall: float | None) -> Any:
    from facepipe.evaluation.identification import few, operating_point, probe
    from facepipe.gallery import Gallery
    from facepipe.index.search import Index

    name, _, value = asked.rpartition("=")
    try:
        fpir = float(value)
    except ValueError:
        fpir = 0.0
    if name.upper() not in ("", "FPIR") or not 0 < fpir < 1:
        raise ConfigError(f"--calibrate takes FPIR=RATE with a rate between 0 and 1, such as FPIR=0.001; got {asked!r}")
    point = operating_point(probe(Gallery(gallery), Index(gallery, recall)), fpir)
    print(_told(point, few(point)), file=sys.stderr)
    return point


def _told(point: Any, few: bool) -> str:
    text = f"threshold {point.threshold:.4f}: {point.false_alarms} false alarms in {point.probes} searches"
    text += f" (FPIR {point.fpir:g}); "
    if point.fnir is None:
        text += "no identity has two faces, so what it misses is not known"
    else:
        text += f"misses {point.fnir:.2%} of the faces whose identity is in the gallery (FNIR)"
    if few:
        text += "; so few alarms that another sample may move it: label more faces, or ask for a higher FPIR"
    return text


class _Progress:
    """A line on stderr every few seconds."""

    def __init__(self, quiet: bool):
        self._quiet, self._last = quiet, time.monotonic()

    def __call__(self, summary: Any) -> None:
        if not self._quiet and time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            rate = summary.queries / max(1e-9, summary.seconds)
            print(f"search: {summary.queries} queries, {rate:.0f}/s", file=sys.stderr, flush=True)


def _show(summary: Any) -> None:
    how = "every face compared" if summary.path == "scan" else f"{summary.nprobe} lists, {summary.rescore} re-scored"
    rows = [
        ("queries", summary.queries),
        ("answers", summary.rows),
        ("faces in the index", summary.vectors),
        ("how", how),
        ("recall@10, measured", summary.recall_at_10),
    ]
    rows += [(f"images: {status}", count) for status, count in summary.images.items()]
    rows += [(f"queries without a search: {reason}", count) for reason, count in summary.bad.items()]
    rows += [("blocks (done before)", f"{summary.blocks} ({summary.skipped_blocks})")]
    if summary.threshold is not None:
        rows += [(f"identified (within {summary.threshold:.4f})", summary.identified), ("Unknown", summary.unknown)]
    table(f"search -> {summary.out}", ("", ""), rows)
    print(f"{summary.seconds:.1f} s")
