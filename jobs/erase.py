"""The command `facepipe erase`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, make_line_printer, print_result, print_table
from jobs.options import DryRun, GalleryPath, Json, Quiet, YesErase

# Images that a dry run prints for people; --json names more.
_MAX_SHOWN = 20

Texts = Optional[list[str]]  # noqa: UP045


def erase(
    gallery: GalleryPath,
    more_receipts: Annotated[
        Texts, typer.Argument(metavar="RECEIPT", help="Further receipts, after --receipt.", show_default=False)
    ] = None,
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
    receipt: Annotated[
        Texts,
        typer.Option(
            "--receipt",
            metavar="RECEIPT",
            help="Receipt of an erasure to repeat, or a folder of receipts; repeatable.",
        ),
    ] = None,
    may_return: Annotated[
        bool, typer.Option("--may-return", help="Permission for a later embed to add the images again.")
    ] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="No waiting for jobs that have to delete the rest.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Completion of erasures that are recorded, instead of a new one.")
    ] = False,
    purge_days: Annotated[
        float,
        typer.Option(
            "--purge-days",
            metavar="DAYS",
            help="Days that erased rows may stay on disk, hidden; 0 removes them at once.",
        ),
    ] = 0.0,
    purge: Annotated[
        bool, typer.Option("--purge", help="Removal of all hidden rows from the disk, instead of a new erasure.")
    ] = False,
    yes_erase: YesErase = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Erase images permanently, and write a receipt.

    Rows, vectors, thumbnails, report entries and old files are erased. All conditions must hold. An image is erased
    with all its faces. Images chosen by --image, --identity or --ids are erased with their exact copies. A later embed
    skips them, unless --may-return is set. The receipt contains no names; `facepipe verify GALLERY --erased RECEIPT`
    looks for what may be left.

    With --receipt, erasures are repeated in a gallery that was restored from a backup, or in another copy of it: the
    images are recognised by the receipts' hashes.

    If a job is running, the erasure is recorded, and no reader returns the images from then on. The job deletes them
    while it goes on.

    With --purge-days, rows in large files are hidden at once, from facepipe and from programs that read Delta tables,
    and stay on disk for some days: the files are then written anew once for all erasures of that time, by `facepipe
    compact` or the nightly job. Only programs that open the Parquet files themselves, and versions of facepipe that do
    not know deleted rows, can see them meanwhile. --purge removes all hidden rows now.

    --dry-run names the images, and says how many other faces and exact copies go too. If a name matches nothing, the
    message has the nearest one that the gallery holds, and the exit code is 1; what else was selected is erased. If no
    image is older than --older-than, or none is missing, nothing is due, and the exit code is 0.

    For example:

        facepipe erase gallery/ --identity "Jane Doe" --dry-run

        facepipe erase gallery/ --source cctv --older-than 30

        facepipe erase gallery/ --identity "Jane Doe" --purge-days 7

        facepipe erase restored/ --receipt saved/erased/
    """
    with exit_on_error("the next erase, or the nightly job, finishes what this one began"):
        from facepipe.erasure.foreign import describe_foreign
        from facepipe.erasure.limits import choose_limit, choose_repeat_limit
        from facepipe.erasure.repeat import read_receipts
        from facepipe.erasure.selection import Selection, read_ids
        from facepipe.erasure.trainings import describe_chips
        from facepipe.errors import ConfigError
        from pipelines import erase as erase_pipeline

        on_progress = make_line_printer("erase", quiet=quiet)
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
        limit = choose_limit(selection, yes_erase or ())
        if more_receipts and not receipt:
            raise ConfigError(f"unexpected argument {more_receipts[0]!r}: receipts follow --receipt")
        if purge:
            if selection.list_conditions() or receipt or dry_run or resume:
                raise ConfigError("--purge removes what is hidden: give it without conditions and --dry-run")
            summary = erase_pipeline.purge(gallery)
        elif resume:
            if selection.list_conditions() or receipt or dry_run:
                raise ConfigError("--resume completes what is recorded: give it without conditions and --dry-run")
            summary = erase_pipeline.resume(gallery, wait=not no_wait, progress=on_progress)
        elif receipt:
            if selection.list_conditions() or may_return:
                raise ConfigError("--receipt repeats what a receipt says: give it without conditions and --may-return")
            summary = erase_pipeline.repeat(
                read_receipts([*receipt, *(more_receipts or ())]),
                gallery,
                dry_run=dry_run,
                wait=not no_wait,
                limit=choose_repeat_limit(yes_erase or ()),
                progress=on_progress,
            )
        else:
            summary = erase_pipeline.run(
                selection,
                gallery,
                dry_run=dry_run,
                may_return=may_return,
                wait=not no_wait,
                limit=limit,
                purge_days=purge_days,
                progress=on_progress,
            )
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(gallery, summary))
        problems = [*summary.unmatched, *summary.doubts]
        if summary.chips:
            problems.append(describe_chips(summary.chips))
        if summary.foreign:
            problems.append(describe_foreign(summary.foreign))
        if summary.left_foreign:
            problems.append(
                f"the images are erased, but {summary.left_foreign} files that facepipe did not write still hold "
                "erased data: `facepipe verify GALLERY --erased RECEIPT` names them"
            )
        if problems:
            fail("; ".join(problems), ExitCode.FAILED)


def _print_summary(gallery: str, summary: Any) -> None:
    from pipelines.erase import MAX_NAMED

    title = "would erase from" if summary.dry_run else "erased from"
    # Print the counts, then the receipts, also those of interrupted erasures that were completed first.
    rows = [(name, getattr(summary, name)) for name in ("images", "faces", "rows")]
    print_table(f"{title} {gallery}", ("", "count"), rows)
    verb = "go" if summary.dry_run else "went"
    if summary.others:
        faces = "1 other face" if summary.others == 1 else f"{summary.others} other faces"
        print(f"{faces} in these photos {verb} too: an image is erased with all its faces")
    if summary.copies:
        copies = "1 image is an exact copy" if summary.copies == 1 else f"{summary.copies} images are exact copies"
        print(f"{copies} of others, under another name")
    for uri in sorted(summary.uris)[:_MAX_SHOWN]:
        print(f"image: {uri}")
    if summary.dry_run and summary.images > _MAX_SHOWN:
        print(f"and {summary.images - _MAX_SHOWN} more: --json names up to {MAX_NAMED}")
    if summary.unknown:
        print(f"{summary.unknown} images of the receipts are not in this gallery, and are kept out of it")
    if summary.decisions:
        print(f"{summary.decisions} decisions about them went too")
    for path in summary.receipts:
        print(f"receipt: {path}")
    if summary.purged:
        print(f"{summary.purged} files of the table were written anew without hidden rows")
    for name, due in summary.purges.items():
        print(f"hidden, and on disk until it is purged, by {due}: {name}")
    for path in summary.trained:
        print(f"a model was trained on some of the faces: {path}")
    if not summary.complete:
        print(
            "not complete: no reader returns the images; a running job, the next erase or the nightly job deletes them"
        )
    if summary.refusal:
        print(f"without --dry-run this is refused: {summary.refusal}")
