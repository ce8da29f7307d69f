"""facepipe embed"""

from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from facepipe.observe.gpu_usage import GpuFigures
from jobs.console import FAILED, OVER_BUDGET, emit, fail, failures, say, table
from jobs.options import ConfigFile, Detector, Embedder, GalleryPath, Json, Settings, models
from jobs.progress import EmbedProgress, figures


def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, glob, s3:// prefix, .parquet file or folder, .tar shards, or a list (.txt, .csv, .tsv).",
            show_default=False,
        ),
    ],
    gallery: GalleryPath,
    identity: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where labels come from: auto, folder, filename, label or none.", show_default="auto"),
    ] = None,
    runner: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="local (processes on this machine), ray, inline, or auto.", show_default="auto"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes.", show_default="one a CPU or GPU")
    ] = None,
    detector: Detector = None,
    embedder: Embedder = None,
    no_thumbs: Annotated[bool, typer.Option("--no-thumbs", help="Store no thumbnails of faces.")] = False,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images that may fail before exit code 3.")
    ] = 1.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Detect, align and embed the faces of a corpus into a gallery.

    Running it again reads only what is new or has changed; after a crash it goes on where it stopped.
    Images that fail are rows with a status and a reason, never the end of the run.

    Example:

        facepipe embed photos/ gallery/

        facepipe embed 's3://bucket/faces' gallery/ --identity folder --runner ray

        facepipe embed photos/ gallery/ --embedder models/mobilefacenet.toml

        facepipe embed casia.txt gallery/ --set source.root=/data/casia --set detect.min_score=0.5
    """
    with failures():
        from pipelines.embed import EmbedConfig, run

        asked = _asked(source, identity, runner, workers, no_thumbs)
        layers = [
            read_toml(config) if config else {},
            asked,
            models(detector, embedder),
            parse_settings(settings or []),
        ]
        chosen = build(EmbedConfig, *layers)
        if chosen.doubt:
            say("embed")(chosen.doubt)
        with EmbedProgress(quiet) as progress:
            summary = run(chosen, gallery, progress)
        emit(summary.to_dict(), as_json, lambda: _show(summary, gallery))
        if summary.failed == summary.listed > 0:
            fail(f"all {summary.images} images failed; `facepipe info {gallery}` lists why", FAILED)
        if summary.failed > max_failed * max(1, summary.images):
            fail(
                f"{summary.failed} of {summary.images} images failed, more than --max-failed {max_failed:g}",
                OVER_BUDGET,
            )


def _asked(
    source: str, identity: str | None, runner: str | None, workers: int | None, no_thumbs: bool
) -> dict[str, Any]:
    """Options as settings; those not given leave the config file's word."""
    tree: dict[str, Any] = {"source": {"uri": source}, "run": {}, "align": {}}
    given = [("source", "identity", identity), ("run", "runner", runner), ("run", "workers", workers)]
    for section, key, value in given:
        if value is not None:
            tree[section][key] = value
    if no_thumbs:
        tree["align"]["thumbs"] = False
    return tree


def _show(summary: Any, gallery: str) -> None:
    rows = [("listed", summary.listed), ("already in the gallery", summary.skipped)]
    rows += [("listed twice", summary.repeated)] if summary.repeated else []
    rows += [("erased before, left out", summary.erased)] if summary.erased else []
    rows += [(f"images: {status}", count) for status, count in sorted(summary.statuses.items())]
    rows += [("missing from the source, marked", summary.missing)] if summary.missing else []
    rows += [("faces", summary.faces), ("other files passed over", summary.ignored)]
    table(f"embed -> {gallery} (version {summary.version})", ("", "count"), rows)
    if summary.gpu:
        print(GpuFigures(**summary.gpu))
    print(f"{figures(summary)}; {summary.workers} workers, {summary.runner}, {summary.seconds:.1f} s")
