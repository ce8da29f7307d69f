"""facepipe dedup"""

import sys
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import emit, failures, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings, given


def dedup(
    gallery: GalleryPath,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GALLERY", help="Look for what this other gallery holds as well.", show_default=False),
    ] = None,
    keep: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which copy stays: largest, sharpest or oldest.", show_default="largest"),
    ] = None,
    drop: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="The weakest kind to drop: exact, near or same_shot.", show_default="near"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find copies: exact (same bytes), near (same picture, changed a little), same_shot (photos of one moment).

    Of each group one image stays; nothing is deleted. Writes pairs.parquet, groups.parquet, decisions.parquet,
    keep.txt, drop.txt and report.html into GALLERY/reports/dedup/. With --against, images and identities that both
    galleries hold, such as test images in a training set, are named in GALLERY/reports/overlap/.

    Example:

        facepipe dedup gallery/ --keep sharpest

        facepipe dedup train/ --against test/
    """
    with failures("the report is what it was before; the same command goes on from the last finished step"):
        from pipelines.dedup import DedupConfig, run

        layers = [read_toml(config) if config else {}, {"dedup": given(keep=keep, drop=drop)}]
        chosen = build(DedupConfig, *layers, parse_settings(settings or []))
        summary = run(chosen, gallery, against, (lambda line: None) if quiet else _say)
        emit(asdict(summary), as_json, lambda: _show(summary))


def _say(line: str) -> None:
    print(f"dedup: {line}", file=sys.stderr, flush=True)


def _show(summary: Any) -> None:
    rows = [
        ("images", summary.images),
        *((f"pairs: {kind.replace('_', ' ')}", count) for kind, count in summary.pairs.items()),
        ("groups", summary.groups),
        ("keep", summary.keep),
        ("drop", summary.drop),
        ("edge recall", f"{summary.recall:.4f}"),
        ("report", f"{summary.out}/report.html"),
    ]
    if summary.shared is not None:
        rows.append(("identities in both", summary.shared))
    if summary.unlisted:
        rows.append(("not in the lists: paths with line breaks", summary.unlisted))
    if summary.without_hash:
        rows.append(("images without a hash: exact copies only (embed them anew)", summary.without_hash))
    table("duplicates" if summary.shared is None else "in both galleries", ("", ""), rows)
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items()))
