"""The command `facepipe clean`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import REPORT_HINT, exit_on_error, make_line_printer, print_result, print_seconds, print_table
from jobs.options import ConfigFile, GalleryPath, HelpSettings, Json, Quiet, Settings, build_config, select_set


def clean(
    gallery: GalleryPath,
    relabels: Annotated[
        bool, typer.Option("--relabels", help="Relabelled faces in the clean lists, under their new identity.")
    ] = False,
    min_face_px: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Smallest usable face, in pixels; smaller ones are low_quality.", show_default="20"),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Judge every identity label of a gallery.

    A label is keep, outlier, relabel, duplicate, low_quality, review, bystander (another face of the image bears it) or
    unverified (the only image of its identity), each with a reason. The share of wrong labels is estimated from the
    corpus itself, and so is the number of wrong decisions. Writes decisions.parquet (faces), images.parquet (every
    image once), identities.parquet, merges.parquet, the lists clean.csv, clean.txt, msceleb.txt, relabel.csv and
    review.csv, and report.html into GALLERY/reports/clean/.

    For example:

        facepipe clean gallery/

        facepipe clean gallery/ --relabels --min-face-px 40 --set duplicates.keep=sharpest
    """
    with exit_on_error(REPORT_HINT):
        from pipelines.clean import CleanConfig, run

        options = {"clean": select_set(relabels=relabels or None, min_face_px=min_face_px)}
        chosen = build_config(CleanConfig, config, settings, options)
        summary = run(chosen, gallery, make_line_printer("clean", quiet=quiet))
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _print_summary(summary: Any) -> None:
    # The number of wrong labels is estimated, so it need not be whole.
    share_wrong = summary.wrong / max(1, summary.labelled - summary.decisions["bystander"])
    rows = [
        ("labelled faces (without label)", f"{summary.labelled} ({summary.unlabelled})"),
        ("identities", summary.identities),
        ("wrong labels, estimated", f"{summary.wrong:.1f} ({share_wrong:.2%})"),
    ]
    # One row per decision, then the expected errors among all of them.
    rows += summary.decisions.items()
    rows += [
        ("expected errors among these", f"{summary.errors:.1f}"),
        ("pairs of identities that are one person", summary.merges),
        ("pairs of identities that look alike", summary.look_alikes),
        ("identities that are two people", summary.splits),
        ("in the clean lists", summary.listed),
        ("in review.csv, to look at", summary.to_review),
        ("edge recall", f"{summary.recall:.4f}"),
    ]
    if summary.unlisted:
        rows.append(("only in clean.csv: paths with line breaks", summary.unlisted))
    print_table(f"labels, settled in {summary.rounds} rounds", ("", ""), rows)
    # Paths stand below the table, which would break long ones.
    if summary.root:
        print(f"paths in msceleb.txt are relative to {summary.root}")
    print(f"report: {summary.out}/report.html; the lists are beside it")
    print_seconds(summary.seconds)
