"""facepipe info, verify, export"""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import FAILED, emit, fail, failures, table
from jobs.options import GalleryPath, Json, Where


def info(gallery: GalleryPath, as_json: Json = False) -> None:
    """Show what a gallery holds: counts by status, model contract, size, last runs, why images failed.

    Example:

        facepipe info gallery/
    """
    with failures():
        from facepipe.gallery import Gallery
        from facepipe.index.manifest import state
        from facepipe.observe.info import describe

        opened = Gallery(gallery)
        found = describe(opened) | {"index": state(opened)}
        emit(found, as_json, lambda: _show(found))


def _show(found: dict[str, Any]) -> None:
    table(
        f"{found['path']} (version {found['version']})",
        ("", "count"),
        [*found["counts"].items(), ("files", found["files"]), ("bytes", found["bytes"])],
    )
    table("contract", ("", ""), found["contract"].items())
    if found["errors"]:
        table(
            "why images failed",
            ("status", "error", "images"),
            ((e["status"], e["error"], e["images"]) for e in found["errors"]),
        )
    if found["index"]:
        table("index", ("", ""), found["index"].items())
    if found["runs"]:
        columns = ("run", "job", "state", "images", "faces", "failed", "seconds")
        table("last runs", columns, ([run.get(c, "") for c in columns] for run in found["runs"]))


def verify(
    gallery: GalleryPath,
    erased: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--erased", metavar="RECEIPT", help="Look for what this receipt says is gone.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Re-read the whole gallery and its index: checksums, counts, unique ids, unit norms. Exit code 1 if any is wrong.

    With --erased: whether any row, vector, old file, log entry or report still holds what a receipt says was erased.

    Example:

        facepipe verify gallery/

        facepipe verify gallery/ --erased gallery/erased/20261122T031500-0a1b2c.json
    """
    with failures():
        if erased:
            _verify_erased(gallery, erased, as_json)
            return
        from facepipe.gallery import Gallery
        from facepipe.gallery.verify import verify as check
        from facepipe.index.manifest import exists

        table_of = Gallery(gallery)
        result = check(table_of)
        if exists(table_of.path):
            from facepipe.index.verify import verify_index

            result.problems += verify_index(table_of)
        figures = asdict(result)
        problems = figures.pop("problems")

        def text() -> None:
            table(f"verify {gallery}", ("", "count"), figures.items())
            print("\n".join(problems) or "sound")

        emit({**figures, "problems": problems}, as_json, text)
        if problems:
            fail(f"{len(problems)} problems", FAILED)


def _verify_erased(gallery: str, path: str, as_json: bool) -> None:
    from facepipe.erasure import receipt
    from facepipe.erasure.proof import check_erased
    from facepipe.gallery import Gallery

    found = receipt.load(path)
    problems = check_erased(Gallery(gallery), found)

    def text() -> None:
        rows = [("images", found.images), ("faces", found.faces), ("erased", found.at)]
        table(f"verify {gallery} --erased {found.id}", ("", ""), rows)
        print("\n".join(problems) or "nothing of it is left")

    emit({"receipt": found.id, "images": found.images, "faces": found.faces, "problems": problems}, as_json, text)
    if problems:
        fail(f"{len(problems)} places still hold what was erased", FAILED)


def export(
    gallery: GalleryPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder for the Parquet files.", show_default=False)],
    columns: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="A,B,C", help="Columns to take.", show_default="all"),
    ] = None,
    where: Where = None,
    version: Annotated[Optional[int], typer.Option(help="Version of the table.", show_default="newest")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Write rows as a plain Parquet folder, for everything that does not read Delta tables.

    Example:

        facepipe export gallery/ faces/ --columns face_id,uri,identity,embedding --where "status = 'ok'"
    """
    with failures():
        from facepipe.gallery import Gallery
        from facepipe.gallery.export import export as write

        chosen = [name.strip() for name in columns.split(",")] if columns else None
        rows = write(Gallery(gallery, version), out, chosen, where)
        emit({"rows": rows, "out": out}, as_json, lambda: print(f"{rows} rows -> {out}"))
