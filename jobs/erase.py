"""facepipe erase, compact"""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import emit, failures, say, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings

Texts = Optional[list[str]]  # noqa: UP045
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


def erase(
    gallery: GalleryPath,
    image: Annotated[
        Texts, typer.Option("--image", metavar="URI", help="An image, by uri or image id; may be repeated.")
    ] = None,
    identity: Annotated[
        Texts, typer.Option("--identity", metavar="NAME", help="All images with this label; may be repeated.")
    ] = None,
    source: Annotated[Optional[str], typer.Option(metavar="NAME", help="All images of a corpus.")] = None,  # noqa: UP045
    uri: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATTERN", help="Images whose uri matches; * stands for slashes as well."),
    ] = None,
    older_than: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--older-than", metavar="DAYS", help="Images embedded longer ago than this."),
    ] = None,
    ids: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ids", metavar="FILE", help="A file of face ids and image ids, one a line."),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Images that their source lists no more.")] = False,
    may_return: Annotated[
        bool, typer.Option("--may-return", help="Let a later embed take the images in again.")
    ] = False,
    dry_run: DryRun = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Erase images for good: rows, vectors, thumbnails, report entries, old files; leaves a receipt.

    Conditions that are given must all hold. Whole images go, with all their faces; those chosen by --image, --identity
    or --ids with their exact copies. A later embed leaves them out, unless --may-return says otherwise. The receipt
    names nobody; `facepipe verify GALLERY --erased RECEIPT` looks for what may be left.

    Example:

        facepipe erase gallery/ --identity "Jane Doe" --dry-run

        facepipe erase gallery/ --source cctv --older-than 30
    """
    with failures("what was begun is finished by the next erase, or the nightly job"):
        from facepipe.erasure.selection import Selection
        from pipelines.erase import run

        asked = Selection(
            tuple(image or ()), tuple(identity or ()), source, uri, older_than, _listed(ids) if ids else (), missing
        )
        summary = run(asked, gallery, dry_run=dry_run, may_return=may_return, progress=say("erase", quiet))
        emit(asdict(summary), as_json, lambda: _show(gallery, summary))


def _listed(path: str) -> tuple[str, ...]:
    from facepipe.errors import ConfigError

    try:
        with open(path, encoding="utf-8-sig") as file:
            found = tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the ids in {path!r}: {error}") from error
    if not found:
        raise ConfigError(f"no id in {path!r}")
    return found


def _show(gallery: str, summary: Any) -> None:
    title = "would erase from" if summary.dry_run else "erased from"
    rows = [(name, getattr(summary, name)) for name in ("images", "faces", "rows")]
    table(f"{title} {gallery}", ("", "count"), rows)
    for path in summary.receipts:
        print(f"receipt: {path}")


def compact(
    gallery: GalleryPath,
    everything: Annotated[bool, typer.Option("--all", help="Join small files even where there are few.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Join a gallery's small files into large ones, and delete files that left the table a day ago.

    No row changes, and the index stays as it is.

    Example:

        facepipe compact gallery/
    """
    with failures():
        from facepipe.config import build, parse_settings, read_toml
        from pipelines.compact import CompactRunConfig, run

        chosen = build(CompactRunConfig, read_toml(config) if config else {}, parse_settings(settings or []))
        summary = run(chosen.compact, gallery, everything, dry_run)
        figures = asdict(summary)
        emit(figures, as_json, lambda: table(f"compact {gallery}", ("", "count"), figures.items()))
