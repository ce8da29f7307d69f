"""The command `facepipe index`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import exit_on_error, make_line_printer, print_result, print_seconds, print_table
from jobs.options import ConfigFile, GalleryPath, HelpSettings, Json, Quiet, Settings, build_config, select_set


def index(
    gallery: GalleryPath,
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIZE", help="Memory budget of a process that builds.", show_default="4GiB"),
    ] = None,
    recall: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, max=1, help="Recall@10 that searches reach.", show_default="0.97"),
    ] = None,
    factory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="FAISS factory string: Flat, or IVF... with any code.", show_default="planned"),
    ] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="New training, and a complete rebuild.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Merge of shards, without deleted faces.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild of damaged shards only.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Build the search index of a gallery, or update it.

    Run it again to add new faces and tombstone deleted ones; the work grows with what changed. The old index answers
    until the new one is complete. After a crash it stays in use.

    For example:

        facepipe index gallery/

        facepipe index gallery/ --memory 64GiB --recall 0.99 --set run.runner=ray

        facepipe index gallery/ --factory IVF16384,SQ8 --retrain
    """
    with exit_on_error("the index is unchanged; run the same command again to start over"):
        from pipelines.index import IndexConfig, run

        # Options override the config; flags say what to do in this run only.
        options = {"index": select_set(memory=memory, recall=recall, factory=factory)}
        summary = run(
            build_config(IndexConfig, config, settings, options),
            gallery,
            retrain=retrain,
            compact_all=compact,
            repair=repair,
            on_progress=make_line_printer("index", quiet=quiet),
        )
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(gallery, summary))


def _print_summary(gallery: str, summary: Any) -> None:
    rows = [
        ("faces", summary.vectors),
        ("added", summary.added),
        ("removed", summary.removed),
        ("unusable vectors, left out", summary.unusable),
        ("shards (merged now)", f"{summary.shards} ({summary.merged})"),
        ("deleted, still in shards", summary.dead),
        ("factory", summary.factory),
        ("lists visited, candidates re-scored", f"{summary.nprobe}, {summary.rescore}"),
        ("recall@10", _format_recall(summary)),
        ("bytes on disk", summary.bytes),
    ]
    # Only a build or a repair has a reason.
    reason = f": {summary.reason}" if summary.reason else ""
    title = f"index of {gallery} (table version {summary.table_version}), {summary.action}{reason}"
    print_table(title, ("", ""), rows)
    print_seconds(summary.seconds)


def _format_recall(summary: Any) -> str:
    # This factory compares every vector, so that there is nothing to measure.
    if summary.factory == "IDMap2,Flat":
        return "exact"
    if summary.recall_at_10 is None:
        return "not measured"
    return f"{summary.recall_at_10:.4f} or better"
