"""The commands `facepipe apply` and `facepipe decisions`."""

import getpass
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, make_line_printer, print_result, print_table
from jobs.options import DryRun, GalleryPath, Json

if TYPE_CHECKING:
    from facepipe.decisions.add import AddSummary

_MAX_SHOWN = 20
_SHOWN_DIGITS = 12

Who = Annotated[
    str,
    typer.Option("--who", metavar="NAME", help="Name of who decides, for rows that do not say.", show_default="login"),
]


def apply(
    gallery: GalleryPath,
    files: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(
            metavar="FILE...",
            help="Files of decisions, relabel.csv of `facepipe clean`, or folders sorted by hand.",
            show_default=False,
        ),
    ] = None,
    from_clean: Annotated[
        bool, typer.Option("--from-clean", help="What the gallery's report of clean decided; needs --at-least.")
    ] = False,
    at_least: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--at-least",
            metavar="P",
            help="Smallest probability at which a decision of clean is applied, such as 0.99.",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Withdrawal of an older decision if a new one says the opposite.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="The other rows are applied if some cannot be. The exit code is then 3.")
    ] = False,
    who: Who = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Apply what people have decided about faces.

    Decisions are kept in GALLERY/decisions/, and every later run respects them. A file may be JSON lines, CSV or
    Parquet with one decision per row, such as the list that a report exports. Each row has a `decision` (is, is_not,
    same_as, different_from, not_a_face, ignore, keep or undo), a `face_id`, and the `person` or the `other_face_id`
    that it needs. In a folder sorted by hand each folder is a person; an image is found by its content, else by its
    file name.

    All rows are checked first. If one cannot be applied, it is named, and nothing is applied. Rows that the gallery has
    already change nothing, so a file may be applied again.

    For example:

        facepipe apply gallery/ decisions.jsonl --dry-run

        facepipe apply gallery/ gallery/reports/clean/relabel.csv --at-least 0.95

        facepipe apply gallery/ sorted-by-hand/ --who Ann

        facepipe apply gallery/ --from-clean --at-least 0.99
    """
    with exit_on_error():
        from facepipe.decisions.apply import apply_files
        from facepipe.gallery import Gallery

        summary = apply_files(
            Gallery(gallery),
            files or [],
            from_clean=from_clean,
            at_least=at_least,
            who=who or _get_login(),
            skip_bad=skip_bad,
            replace=replace,
            dry_run=dry_run,
        )
        values = asdict(summary) | {"problems": [str(problem) for problem in summary.problems]}
        values.pop("added_ids")
        print_result(values, as_json=as_json, print_text=lambda: _print_added(gallery, summary, values))
        _end(summary)


def _get_login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number without a name
        return ""


def _print_added(gallery: str, summary: "AddSummary", values: dict[str, Any]) -> None:
    words = {"known": "in the gallery before", "undone": "of those taken back", "replaced": "older ones taken back"}
    words |= {"by_content": "images found by content", "by_name": "images found by name", "ignored": "files ignored"}
    words |= {"refused": "rows refused"}
    rows: list[tuple[str, int]] = [("rows", summary.rows)]
    rows += [(f"new: {kind}", count) for kind, count in summary.added.items()]
    rows += [(words[name], values[name]) for name in words if values.get(name)]
    state = "dry run, nothing is written" if summary.dry_run else "applied" if summary.is_applied else "nothing applied"
    print_table(f"apply {gallery}: {state}", ("", "count"), rows)
    if summary.is_applied and summary.added:
        print(f"next: run the report again, such as `facepipe clean {gallery}`: it respects the decisions")


def _end(summary: "AddSummary") -> None:
    """Name the rows that were refused, and end with the code that says so."""
    print_line = make_line_printer("apply")
    for problem in summary.problems[:_MAX_SHOWN]:
        print_line(_make_printable(str(problem)))
    if summary.refused > _MAX_SHOWN:
        print_line(f"… and {summary.refused - _MAX_SHOWN} more")
    if not summary.refused:
        return
    if summary.is_applied:
        fail(f"{summary.refused} rows were refused; the others are applied", ExitCode.OVER_BUDGET)
    hint = "mend them, or add --skip-bad to apply the others"
    if any("conflict:" in problem.reason for problem in summary.problems):
        hint += "; --replace takes older decisions back that new ones contradict"
    fail(f"{summary.refused} of {summary.rows} rows cannot be applied, and nothing was: {hint}", ExitCode.FAILED)


def _make_printable(text: str) -> str:
    """Replace characters that a terminal would obey."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def decisions(
    gallery: GalleryPath,
    undo: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--undo",
            metavar="ID",
            help="Decision to take back, by its id or the id's first digits; an undo as well. Repeatable.",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--export",
            metavar="FILE",
            help="File (.jsonl, .csv, .parquet) for all decisions, which `facepipe apply` takes.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also decisions that were taken back, and the undos.")
    ] = False,
    person: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--person", metavar="NAME", help="Only decisions that name this person.", show_default=False),
    ] = None,
    count: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-n", "--count", min=1, help="Largest number of decisions.", show_default="20, all with --json"),
    ] = None,
    who: Who = "",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Show what people have decided about faces, newest first.

    With --undo, take decisions back. That is a decision too: --undo with its id brings them back. With --export, write
    all of them to a file.

    For example:

        facepipe decisions gallery/

        facepipe decisions gallery/ --undo 14ae01190e11

        facepipe decisions gallery/ --export decisions.jsonl
    """
    with exit_on_error():
        from facepipe.decisions import undo_decisions
        from facepipe.decisions.export import export_decisions
        from facepipe.errors import ConfigError
        from facepipe.gallery import Gallery

        opened = Gallery(gallery)
        if undo and export:
            raise ConfigError("--undo and --export exclude each other: leave out one of them")
        if undo:
            summary = undo_decisions(opened, undo, who=who or _get_login(), dry_run=dry_run)
            undone = {"undone": len(summary.added_ids), "ids": summary.added_ids, "dry_run": dry_run}
            print_result(undone, as_json=as_json, print_text=lambda: _print_undone(summary))
            _end(summary)
        elif export:
            written = export_decisions(opened, export)
            print_result(
                {"decisions": written, "file": export},
                as_json=as_json,
                print_text=lambda: print(f"{written} decisions, undos included: {export}"),
            )
        else:
            _list_decisions(gallery, everything=everything, person=person, count=count, as_json=as_json)


def _print_undone(summary: "AddSummary") -> None:
    if summary.dry_run:
        print(f"{len(summary.added_ids)} decisions would be taken back")
        return
    for decision_id in summary.added_ids:
        print(f"taken back; --undo {decision_id[:_SHOWN_DIGITS]} brings it back")


def _list_decisions(path: str, *, everything: bool, person: str | None, count: int | None, as_json: bool) -> None:
    from facepipe.decisions.listing import list_decisions

    most = count if count is not None else None if as_json else _MAX_SHOWN
    listing = list_decisions(path, everything=everything, person=person, most=most)

    def print_text() -> None:
        if not listing.total:
            print("nobody has decided anything: `facepipe apply` takes decisions")
            return
        columns = ("id", "when", "decision", "faces", "person", "who", "")
        print_table(f"{listing.shown} of {listing.total} decisions", columns, map(_list_cells, listing.rows))

    values = {"decisions": listing.rows, "shown": listing.shown, "total": listing.total, "counts": listing.counts}
    print_result(values, as_json=as_json, print_text=print_text)


def _list_cells(row: dict[str, Any]) -> list[str]:
    faces = " ".join(row[name] for name in ("face_id", "other_face_id") if name in row)
    time = row.get("when") or row.get("added_at") or ""
    subject = row.get("person") or row.get("undoes", "")[:_SHOWN_DIGITS]
    cells = (
        row["decision_id"][:_SHOWN_DIGITS],
        time[:16].replace("T", " "),
        row["decision"],
        faces,
        subject,
        row.get("who", ""),
        row["state"] if row["state"] != "active" else "",
    )
    return [_make_printable(cell) for cell in cells]
