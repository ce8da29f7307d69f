"""The command `facepipe identify`."""

import sys
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe import storage
from jobs.console import exit_on_error, print_result, print_table
from jobs.options import (
    ConfigFile,
    Decide,
    GalleryPath,
    HelpSettings,
    Json,
    Quiet,
    Settings,
    build_config,
    select_set,
)
from jobs.progress import ProgressReporter, show_embedding


def identify(
    gallery: GalleryPath,
    photos: Annotated[
        str,
        typer.Argument(metavar="PHOTOS", help="Photos (whatever embed takes), or a gallery.", show_default=False),
    ],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="File for the answers: .csv or .parquet.", show_default=False),
    ],
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Maximum distance for a match.", show_default="chosen for --fpir"),
    ] = None,
    fpir: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Rate of false alarms to choose the threshold for.", show_default="0.01"),
    ] = None,
    decide: Annotated[
        Optional[Decide],  # noqa: UP045
        typer.Option(
            help="Name by the nearest face, or by a vote of those within the threshold.", show_default="nearest"
        ),
    ] = None,
    best_per_photo: Annotated[
        bool, typer.Option("--best-per-photo", help="One row per photo: the face that is identified most surely.")
    ] = False,
    keep_queries: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FOLDER",
            help="Folder to keep the embedded photos in; the next call embeds only new ones.",
            show_default=False,
        ),
    ] = None,
    page: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE.html", help="Page of the faces beside the matched ones.", show_default=False),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Say who is in photos: a row per photo and face, with the best person or Unknown.

    Each row has the box of the face, the nearest person with the distance, the runner-up with its distance, and the
    margin between the two. A photo that could not be read, or shows no face, has a row that says so. Threshold, rate of
    false alarms, model and version of the index are in the file's metadata (of OUT.csv in OUT.csv.json).

    For example:

        facepipe identify gallery/ new_photos/ who.csv

        facepipe identify gallery/ new_photos/ who.parquet --fpir 0.001 --keep-queries queries/ --page who.html
    """
    with exit_on_error():
        from pipelines.identify import IdentifyConfig, run

        options = {
            "identify": select_set(
                threshold=threshold,
                fpir=fpir,
                decide=decide,
                best_per_photo=True if best_per_photo else None,
            )
        }
        chosen = build_config(IdentifyConfig, config, settings, options)
        with ProgressReporter("identify", quiet=quiet) as progress:
            summary = run(
                chosen,
                gallery,
                photos,
                out,
                keep_queries=keep_queries,
                page=page,
                on_embed=lambda embedded: show_embedding(progress, embedded),
            )
        for note in summary.notes:
            print(f"facepipe: {note}", file=sys.stderr)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary, page))


def _print_summary(summary: Any, page: str | None) -> None:
    from facepipe.schema import OK

    rows = [("photos", summary.photos)]
    rows += [(f"photos: {status}", count) for status, count in summary.statuses.items()]
    rows += [("faces", summary.faces), ("identified", summary.identified), ("Unknown", summary.unknown)]
    print_table(f"identify -> {summary.out}", ("", "count"), rows)
    origins = {
        "given": "given",
        "model": "the model's own",
        "fpir": f"for one false alarm in {1 / (summary.fpir or 1):,.0f} strangers",
    }
    line = f"threshold: {summary.threshold:.4f}, {origins[summary.threshold_origin]}"
    if summary.fnir is not None:
        line += f"; it misses {summary.fnir:.1%} of the faces of known people in this gallery"
    print(line)
    print(f"in: {summary.photos:,} photos, {summary.faces:,} faces; {summary.seconds:.1f} s")
    others = summary.photos - summary.statuses.get(OK, 0)
    if others:
        print(f"not identified: {others:,} photos, whose rows have the status and the reason")
    print(f"answers: {storage.to_absolute(summary.out)}")
    if page:
        print(f"page: {storage.to_absolute(page)}")
    else:
        print("next: the same with --page FILE.html shows the faces beside the matched ones")
