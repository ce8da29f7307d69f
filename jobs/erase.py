"""The command `facepipe erase`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, make_line_printer, print_result, print_table
from jobs.options import DryRun, GalleryPath, Json, Quiet

Texts = Optional[list[str]]  # noqa: UP045


def erase(
    gallery: GalleryPath,
    image: Annotated[
        Texts, typer.Option("--image", metavar="URI", help="Single image, by uri or image id; repeatable.")
    ] = None,
    identity: Annotated[
        Texts, typer.Option("--identity", metavar="NAME", help="All images with this label; repeatable.")
    ] = None,
    source: Annotated[Optional[str], typer.Option(metavar="NAME", help="All images of a corpus.")] = None,  # noqa: UP045
    uri: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PATTERN", help="Images whose uri matches; * matches slashes as well."),
    ] = None,
    older_than: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--older-than", metavar="DAYS", help="Images embedded more than this many days ago."),
    ] = None,
    ids: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ids", metavar="FILE", help="File of face ids and image ids, one per line."),
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Images that their source no longer lists.")] = False,
    may_return: Annotated[
        bool, typer.Option("--may-return", help="Permission for a later embed to add the images again.")
    ] = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Erase images permanently, and write a receipt.

    Rows, vectors, thumbnails, report entries and old files are erased. All conditions must hold. An image is erased
    with all its faces. Images chosen by --image, --identity or --ids are erased with their exact copies. A later embed
    skips them, unless --may-return is set. The receipt contains no names; `facepipe verify GALLERY --erased RECEIPT`
    looks for what may be left.

    For example:

        facepipe erase gallery/ --identity "Jane Doe" --dry-run

        facepipe erase gallery/ --source cctv --older-than 30
    """
    with exit_on_error("the next erase, or the nightly job, finishes what this one began"):
        from facepipe.erasure.foreign import describe_foreign
        from facepipe.erasure.selection import Selection, read_ids
        from pipelines.erase import run

        # All conditions that are given must hold; an empty selection is refused before anything is done.
        selection = Selection(
            images=tuple(image or ()),
            identities=tuple(identity or ()),
            source=source,
            uri=uri,
            older_than_days=older_than,
            ids=read_ids(ids) if ids else (),
            missing=missing,
        )
        on_progress = make_line_printer("erase", quiet=quiet)
        summary = run(selection, gallery, dry_run=dry_run, may_return=may_return, progress=on_progress)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(gallery, summary))
        if summary.foreign:
            fail(describe_foreign(summary.foreign), ExitCode.FAILED)


def _print_summary(gallery: str, summary: Any) -> None:
    title = "would erase from" if summary.dry_run else "erased from"
    # Print the counts, then the receipts, also those of interrupted erasures that were completed first.
    rows = [(name, getattr(summary, name)) for name in ("images", "faces", "rows")]
    print_table(f"{title} {gallery}", ("", "count"), rows)
    for path in summary.receipts:
        print(f"receipt: {path}")
