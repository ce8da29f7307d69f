"""The commands `facepipe info`, `verify` and `export`."""

from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from heapq import nsmallest
from typing import Annotated, Any, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, print_result, print_table
from jobs.options import GalleryPath, Json, Where


class ExportFormat(StrEnum):
    """Formats of exports."""

    PARQUET = "parquet"
    LIST = "list"
    COCO = "coco"
    FIFTYONE = "fiftyone"
    LANCE = "lance"
    MILVUS = "milvus"
    QDRANT = "qdrant"
    PGVECTOR = "pgvector"


# Figures of a run's record that are shown for each of the last runs.
_RUN_COLUMNS = ("run", "job", "state", "started", "images", "faces", "failed", "seconds")


def info(
    gallery: GalleryPath,
    failed: Annotated[bool, typer.Option("--failed", help="The images that failed, in place of the rest.")] = False,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Largest number of images for --failed.")] = 20,
    failed_list: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--failed-list",
            metavar="FILE",
            help="CSV file for all images that failed: path, status, error.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a gallery holds.

    Shown are counts by status, model contract, size, last runs, why images failed, and how far a migration is.

    For example:

        facepipe info gallery/

        facepipe info gallery/ --failed

        facepipe info gallery/ --failed-list failed.csv
    """
    with exit_on_error():
        if failed or failed_list:
            _show_failed(gallery, count=count, path=failed_list, as_json=as_json)
            return
        import facepipe
        from facepipe.curation.report_folders import describe_reports
        from facepipe.decisions.listing import describe_decisions
        from facepipe.erasure.purges import format_due, list_purges
        from facepipe.gallery import Gallery
        from facepipe.gallery.migration import describe_migration
        from facepipe.index.lag import describe_state
        from facepipe.observe.info import describe_gallery
        from facepipe.provenance import format_date

        opened = Gallery(gallery)
        description = describe_gallery(opened) | {
            "index": describe_state(opened),
            "reports": describe_reports(opened),
            "decisions": describe_decisions(opened.path),
            "migration": describe_migration(opened),
            "hidden": {purge.id: format_due(purge.due) for purge in list_purges(opened.path)},
            "facepipe": facepipe.__version__,
            "now": format_date(),
        }
        print_result(description, as_json=as_json, print_text=lambda: _print_info(description))


def _show_failed(gallery: str, *, count: int, path: str | None, as_json: bool) -> None:
    """Show some of the images that failed, or write all of them to a file."""
    from facepipe.gallery import Gallery
    from facepipe.observe.info import iterate_failed, write_failed

    opened = Gallery(gallery)
    if path:
        written = write_failed(opened, path)
        print_result(
            {"failed": written, "list": path},
            as_json=as_json,
            print_text=lambda: print(f"{written} images failed: {path} lists them"),
        )
        return
    # The first by name, whatever the order of the table. One more than are shown tells whether there are more.
    rows = nsmallest(count + 1, iterate_failed(opened), key=lambda row: str(row["uri"]))
    shown = rows[:count]

    def print_text() -> None:
        if not shown:
            print("no image failed")
            return
        # No table, which would break long paths.
        for row in shown:
            reason = f": {row['error']}" if row["error"] else ""
            print(f"{row['uri']} ({row['status']}{reason})")
        if len(rows) > count:
            print("there are more: -n NUMBER shows them, --failed-list FILE writes all")

    print_result({"images": shown, "more": len(rows) > count}, as_json=as_json, print_text=print_text)


def _print_info(description: dict[str, Any]) -> None:
    counts = [*description["counts"].items(), ("files", description["files"]), ("bytes", description["bytes"])]
    title = f"{description['path']} (version {description['version']})"
    print_table(f"{title}, {description['now']}, facepipe {description['facepipe']}", ("", "count"), counts)
    print_table("contract", ("", ""), description["contract"].items())
    # Tables without rows are left out.
    if description["errors"]:
        rows = [(error["status"], error["error"], error["images"]) for error in description["errors"]]
        files = description["errors_files"]
        part = "" if files["read"] == files["of"] else f", in {files['read']} of {files['of']} files with failed images"
        print_table(f"why images failed{part}", ("status", "error", "images"), rows)
    if description["index"]:
        print_table("index", ("", ""), description["index"].items())
    if description["migration"]:
        print_table("migration under way", ("", ""), description["migration"].items())
    if description["hidden"]:
        print_table("erased, hidden, and on disk until", ("erasure", "purge due"), description["hidden"].items())
    if description["decisions"]:
        print_table("decisions", ("", "count"), description["decisions"].items())
    if description["reports"]:
        cells = [_list_report_cells(report, description["version"]) for report in description["reports"]]
        print_table("reports", ("report", "made", "table version", "command"), cells)
    if description["runs"]:
        # Times in full are in --json.
        shown = [{**run, "started": run["started"][:16].replace("T", " ")} for run in description["runs"]]
        runs = [[run.get(column, "") for column in _RUN_COLUMNS] for run in shown]
        print_table("last runs", _RUN_COLUMNS, runs)


def _list_report_cells(report: dict[str, Any], version: int) -> tuple[str, str, str, str]:
    """List what the table of reports says of one, with what to do if it is older than the gallery."""
    state = str(report["version"]) if report["version"] is not None else "unknown"
    if report["up to date"] is False:
        state = f"{state} of {version}: stale, make it again"
    return report["report"], report["made"] or "unknown", state, report["command"]


def verify(
    gallery: GalleryPath,
    erased: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--erased",
            metavar="RECEIPT",
            help="Receipt of an erasure, to check that nothing is left.",
            show_default=False,
        ),
    ] = None,
    other_gallery: Annotated[
        bool, typer.Option("--other-gallery", help="Acceptance of a receipt that another gallery wrote.")
    ] = False,
    also: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--also",
            metavar="FOLDER",
            help="Further folders to search, such as exports and chips. Repeatable, with --erased.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Comparison of names and sizes with the log only: no file is read.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a whole gallery and its index for damage.

    All files are read, and their checksums, counts, unique ids and unit norms are checked, and that no receipt of an
    erasure is missing or altered. With --quick it takes seconds, and shows only whether files are missing or have other
    sizes. The exit code is 1 if a check fails. A gallery is sound if nothing is damaged, and
    complete if its index holds every face; one that is sound but not complete ends with code 0.

    With --erased, check instead that no row, vector, old file, log entry or report still holds what the receipt lists
    as erased. If it was erased with --purge-days, and rows are on disk still, the result says by when they will be
    gone, and the exit code is 1 until they are.

    For example:

        facepipe verify gallery/

        facepipe verify gallery/ --quick

        facepipe verify gallery/ --erased gallery/erased/20261122T031500-0a1b2c.json

        facepipe verify gallery/ --erased gallery/erased/20261122T031500-0a1b2c.json --also exports/ --also train/chips/
    """
    with exit_on_error():
        if also and not erased:
            from facepipe.errors import ConfigError

            raise ConfigError("--also needs a receipt: add --erased RECEIPT")
        if quick and erased:
            from facepipe.errors import ConfigError

            raise ConfigError("--quick reads no file, and a proof of an erasure reads all: choose one of them")
        if quick:
            _verify_quickly(gallery, as_json=as_json)
        elif erased:
            _verify_erased(gallery, erased, also or [], of_other_gallery=other_gallery, as_json=as_json)
        else:
            _verify_gallery(gallery, as_json=as_json)


def _verify_gallery(path: str, *, as_json: bool) -> None:
    from facepipe.decisions.table import verify_table as verify_decisions
    from facepipe.erasure.chain import read_chain
    from facepipe.erasure.purges import describe_overdue
    from facepipe.gallery import Gallery
    from facepipe.gallery.maintenance.verify import verify_gallery as verify_table
    from facepipe.index.lag import describe_gaps
    from facepipe.index.manifest import exists
    from facepipe.index.verify import verify_index

    gallery = Gallery(path)
    # Problems are listed apart from the figures, those of the table first.
    figures = asdict(verify_table(gallery))
    problems = figures.pop("problems")
    if exists(gallery.path):
        problems += verify_index(gallery)
    problems += read_chain(gallery.path).problems
    problems += describe_overdue(gallery.path)
    decisions, damage = verify_decisions(gallery.path)
    problems += damage
    if decisions:
        figures["decisions"] = decisions
    # What is sound may still lack something: a search returns only what the index holds.
    gaps = describe_gaps(gallery)

    def print_text() -> None:
        print_table(f"verify {path}", ("", "count"), figures.items())
        print("\n".join(problems) or "sound: nothing is damaged")
        print("\n".join(f"not complete: {gap}" for gap in gaps) or "complete: the index holds every face")

    # Print the result before the command fails, so that programs get the JSON in any case.
    result = {**figures, "problems": problems, "complete": not gaps, "gaps": gaps}
    print_result(result, as_json=as_json, print_text=print_text)
    if problems:
        fail(f"{len(problems)} problems", ExitCode.FAILED)


def _verify_quickly(path: str, *, as_json: bool) -> None:
    """Compare the names and sizes of a gallery's files with its log and with the index's manifest."""
    from facepipe.erasure.chain import read_chain
    from facepipe.erasure.purges import describe_overdue
    from facepipe.gallery import Gallery
    from facepipe.gallery.maintenance.quick import check_files
    from facepipe.index.manifest import exists
    from facepipe.index.verify import check_index_files

    gallery = Gallery(path)
    checked = check_files(gallery)
    problems = checked.problems
    if exists(gallery.path):
        problems += check_index_files(gallery)
    problems += read_chain(gallery.path).problems
    problems += describe_overdue(gallery.path)
    figures = {name: getattr(checked, name) for name in ("version", "files", "rows", "faces")}

    def print_text() -> None:
        print_table(f"verify --quick {path}", ("", "count"), figures.items())
        print(
            "\n".join(problems) or "all files are there, with the sizes that were written; what is in them was not read"
        )

    print_result({**figures, "problems": problems}, as_json=as_json, print_text=print_text)
    if problems:
        fail(f"{len(problems)} problems", ExitCode.FAILED)


def _verify_erased(path: str, receipt_path: str, also: list[str], *, of_other_gallery: bool, as_json: bool) -> None:
    from facepipe.erasure import receipt
    from facepipe.erasure.proof import check_folder, prove_erasure
    from facepipe.erasure.purges import format_due
    from facepipe.gallery import Gallery

    erasure = receipt.load_receipt(receipt_path)
    # The receipt holds hashes, which are compared with hashes of what the gallery still holds.
    proof = prove_erasure(Gallery(path), erasure, of_other_gallery=of_other_gallery)
    problems = [*proof.problems]
    for folder in also:
        problems += check_folder(folder, erasure)

    def print_text() -> None:
        rows = [("images", erasure.images), ("faces", erasure.faces), ("erased", erasure.at)]
        print_table(f"verify {path} --erased {erasure.id}", ("", ""), rows)
        print("\n".join(problems) or ("hidden from all readers" if proof.hidden else "nothing of it is left"))
        if proof.hidden:
            print("\n".join(f"on disk until it is purged: {line}" for line in proof.hidden))

    result = {
        "receipt": erasure.id,
        "images": erasure.images,
        "faces": erasure.faces,
        "signed": bool(erasure.mac),
        "state": "left" if problems else proof.state,
        "purge_due": proof.due,
        "hidden": proof.hidden,
        "problems": problems,
    }
    print_result(result, as_json=as_json, print_text=print_text)
    if problems:
        fail(f"{len(problems)} problems: something of it is left, or the receipt was altered", ExitCode.FAILED)
    if proof.hidden:
        due = format_due(datetime.fromisoformat(proof.due))
        fail(
            f"not gone yet: no reader returns it, and it leaves the disk by {due}; `facepipe erase {path} --purge` "
            "removes it now",
            ExitCode.FAILED,
        )


def export(
    gallery: GalleryPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the files.", show_default=False)],
    columns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,C", help="Columns to write.", show_default="all"),
    ] = None,
    where: Where = None,
    version: Annotated[Optional[int], typer.Option(help="Version of the table.", show_default="newest")] = None,  # noqa: UP045
    kind: Annotated[ExportFormat, typer.Option("--format", help="Format of the files.")] = ExportFormat.PARQUET,
    with_ignored: Annotated[
        bool, typer.Option("--with-ignored", help="Also faces that people ignore, or that are no faces.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write rows or faces for other programs.

    parquet is a plain folder of all rows, for programs that do not read Delta tables. list is a CSV file of faces. coco
    and fiftyone are annotations: boxes, points and labels. lance is a dataset of Lance. milvus, qdrant and pgvector are
    files that these stores load themselves. Nobody who was erased is in any of them. A name that people have confirmed
    is the identity, and faces that they ignore are left out; --where compares with the labels of the source.

    For example:

        facepipe export gallery/ faces/ --columns face_id,uri,identity,embedding --where "status = 'ok'"

        facepipe export gallery/ for-qdrant/ --format qdrant
    """
    with exit_on_error():
        from facepipe.decisions.gallery import DecidedGallery
        from facepipe.errors import ConfigError
        from facepipe.exports.export import export_faces
        from facepipe.gallery.export import export_parquet as export_rows

        opened = DecidedGallery(gallery, version, drop_ignored=not with_ignored)
        if kind is not ExportFormat.PARQUET:
            if columns is not None:
                raise ConfigError(f"--columns belongs to --format parquet: {kind.value} has columns of its own")
            faces = export_faces(opened, out, kind.value, where)
            print_result(
                {"faces": faces, "out": out}, as_json=as_json, print_text=lambda: print(f"{faces} faces -> {out}")
            )
            return
        # Spaces after the commas are allowed.
        names = [name.strip() for name in columns.split(",")] if columns else None
        rows = export_rows(opened, out, names, where)
        print_result({"rows": rows, "out": out}, as_json=as_json, print_text=lambda: print(f"{rows} rows -> {out}"))
