"""facepipe index"""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import emit, failures, say, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings


def index(
    gallery: GalleryPath,
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="Memory budget of a process that builds.", show_default="4GiB"),
    ] = None,
    recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="Recall@10 to be reached.", show_default="0.97")
    ] = None,
    factory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A faiss factory string: Flat, or IVF... with any code.", show_default="planned"),
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train anew and build everything.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Merge shards, and drop what was deleted.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild damaged shards, and only those.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Build the search index of a gallery, or bring it up to date.

    Running it again adds the faces that came and buries those that went, in proportion to what changed. The old index
    answers until the new one is complete; a crash leaves it in force.

    Example:

        facepipe index gallery/

        facepipe index gallery/ --memory 64GiB --recall 0.99 --set run.runner=ray

        facepipe index gallery/ --factory IVF16384,SQ8 --retrain
    """
    with failures("the index is what it was before; the same command starts again"):
        from pipelines.index import IndexConfig, run

        given = {"memory": memory, "recall": recall, "factory": factory}
        asked = {"index": {name: value for name, value in given.items() if value is not None}}
        layers = [read_toml(config) if config else {}, asked, parse_settings(settings or [])]
        summary = run(
            build(IndexConfig, *layers),
            gallery,
            retrain=retrain,
            compact_all=compact,
            repair=repair,
            progress=say("index", quiet),
        )
        emit(asdict(summary), as_json, lambda: _show(gallery, summary))


def _show(gallery: str, summary: Any) -> None:
    measured = "not measured" if summary.recall_at_10 is None else f"{summary.recall_at_10:.4f} or better"
    reached = "exact" if summary.factory == "IDMap2,Flat" else measured
    rows = [
        ("faces", summary.vectors),
        ("added", summary.added),
        ("removed", summary.removed),
        ("unusable vectors left out", summary.unusable),
        ("shards (merged now)", f"{summary.shards} ({summary.merged})"),
        ("deleted, still in shards", summary.dead),
        ("factory", summary.factory),
        ("lists visited, candidates re-scored", f"{summary.nprobe}, {summary.rescore}"),
        ("recall@10", reached),
        ("bytes on disk", summary.bytes),
    ]
    because = f": {summary.reason}" if summary.reason else ""
    table(f"index of {gallery} (table version {summary.table_version}), {summary.action}{because}", ("", ""), rows)
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items()))
