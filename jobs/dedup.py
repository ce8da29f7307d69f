"""The command `facepipe dedup`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.errors import ConfigError
from jobs.console import REPORT_HINT, exit_on_error, make_line_printer, print_result, print_seconds, print_table
from jobs.options import (
    ConfigFile,
    Drop,
    GalleryPath,
    HelpSettings,
    Json,
    Keep,
    Quiet,
    Settings,
    build_config,
    select_set,
)


def dedup(
    gallery: GalleryPath,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GALLERY", help="Another gallery, to find what both of them hold.", show_default=False),
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Only images added since the last run (requires an index).")
    ] = False,
    keep: Annotated[
        Optional[Keep],  # noqa: UP045
        typer.Option(help="Copy to keep.", show_default="largest"),
    ] = None,
    drop: Annotated[
        Optional[Drop],  # noqa: UP045
        typer.Option(help="Weakest kind of copy to drop.", show_default="near"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Find copies of images.

    Kinds of copies are exact (same bytes), near (same picture, slightly changed) and same_shot (photos of one moment).
    One image of each group is kept; nothing is deleted. Writes pairs.parquet, groups.parquet, decisions.parquet,
    keep.txt, drop.txt and report.html into GALLERY/reports/dedup/.

    With --against, images and identities that both galleries hold are listed in GALLERY/reports/overlap/. Use it to
    find test images in a training set.

    With --new, images added since the last --new are looked up in the search index, which must be up to date. Their
    files go into GALLERY/reports/dedup-new/. The cost grows with the number of new images only.

    For example:

        facepipe dedup gallery/ --keep sharpest

        facepipe dedup train/ --against test/

        facepipe dedup gallery/ --new
    """
    with exit_on_error(REPORT_HINT):
        from pipelines.dedup import DedupConfig, run
        from pipelines.dedup.incremental import run as run_new

        chosen = build_config(DedupConfig, config, settings, {"dedup": select_set(keep=keep, drop=drop)})
        on_progress = make_line_printer("dedup", quiet=quiet)
        # The search for new images uses the index, which holds one gallery only.
        if new and against:
            raise ConfigError("--new and --against exclude each other: leave out one of them")
        if new:
            new_summary = run_new(chosen, gallery, on_progress)
            print_result(asdict(new_summary), as_json=as_json, print_text=lambda: _print_new(new_summary))
            return
        summary = run(chosen, gallery, against, on_progress)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _print_summary(summary: Any) -> None:
    rows = [("images", summary.images), *_list_pairs(summary)]
    rows += [
        ("groups", summary.groups),
        ("keep", summary.keep),
        ("drop", summary.drop),
        ("edge recall", f"{summary.recall:.4f}"),
    ]
    # Only a comparison of two galleries has shared identities.
    if summary.shared is not None:
        rows.append(("persons in both", summary.shared))
        rows.append(("look-alikes, or one name only", summary.look_alikes))
    rows += _list_left_out(summary)
    print_table("duplicates" if summary.shared is None else "in both galleries", ("", ""), rows)
    print(f"report: {summary.out}/report.html; the lists are beside it")
    print_seconds(summary.seconds)


def _print_new(summary: Any) -> None:
    rows = [("new images", summary.new), ("old images compared with them", summary.compared), *_list_pairs(summary)]
    rows += [
        ("groups", summary.groups),
        ("keep", summary.keep),
        ("drop", summary.drop),
    ]
    rows += _list_left_out(summary)
    print_table("duplicates of new images", ("", ""), rows)
    print(f"report: {summary.out}/report.html" if summary.new else "the report is unchanged")
    print_seconds(summary.seconds)


def _list_pairs(summary: Any) -> list[tuple[str, Any]]:
    return [(f"pairs: {kind.replace('_', ' ')}", count) for kind, count in summary.pairs.items()]


def _list_left_out(summary: Any) -> list[tuple[str, Any]]:
    """Return the rows on images that a list or a comparison had to leave out."""
    rows = []
    if summary.unlisted:
        rows.append(("not in the lists: paths with line breaks", summary.unlisted))
    if summary.without_hash:
        rows.append(("images without a hash: exact copies only (embed them again)", summary.without_hash))
    return rows
