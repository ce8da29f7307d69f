"""facepipe dedup"""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from facepipe.errors import ConfigError
from jobs.console import emit, failures, say, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings, given


def dedup(
    gallery: GalleryPath,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="GALLERY", help="Look for what this other gallery holds as well.", show_default=False),
    ] = None,
    new: Annotated[
        bool, typer.Option("--new", help="Only the images that came since the last time; needs an index.")
    ] = False,
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
    galleries hold, such as test images in a training set, are named in GALLERY/reports/overlap/. With --new, the images
    that came since the last --new are looked up in the search index, which must be up to date, and the same files with
    what concerns them go into GALLERY/reports/dedup-new/; what that costs grows with what is new.

    Example:

        facepipe dedup gallery/ --keep sharpest

        facepipe dedup train/ --against test/

        facepipe dedup gallery/ --new
    """
    with failures("the report is what it was before; the same command goes on from the last finished step"):
        from pipelines.dedup import DedupConfig, run
        from pipelines.dedup.incremental import run as run_new

        layers = [read_toml(config) if config else {}, {"dedup": given(keep=keep, drop=drop)}]
        chosen = build(DedupConfig, *layers, parse_settings(settings or []))
        tell = say("dedup", quiet)
        if new:
            if against:
                raise ConfigError("--new is of one gallery: leave out --against, or --new")
            found = run_new(chosen, gallery, tell)
            emit(asdict(found), as_json, lambda: _show_new(found))
            return
        summary = run(chosen, gallery, against, tell)
        emit(asdict(summary), as_json, lambda: _show(summary))


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


def _show_new(summary: Any) -> None:
    rows = [
        ("new images", summary.new),
        ("old images compared with them", summary.compared),
        *((f"pairs: {kind.replace('_', ' ')}", count) for kind, count in summary.pairs.items()),
        ("groups", summary.groups),
        ("keep", summary.keep),
        ("drop", summary.drop),
        ("report", f"{summary.out}/report.html" if summary.new else "as it was"),
    ]
    if summary.unlisted:
        rows.append(("not in the lists: paths with line breaks", summary.unlisted))
    if summary.without_hash:
        rows.append(("images without a hash: exact copies only (embed them anew)", summary.without_hash))
    table("duplicates of new images", ("", ""), rows)
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items()))
