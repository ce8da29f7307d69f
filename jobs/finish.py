"""The command `facepipe finish`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import REPORT_HINT, exit_on_error, make_line_printer, print_result, print_seconds, print_table
from jobs.dataset import Format, print_left_out
from jobs.options import ConfigFile, GalleryPath, HelpSettings, Json, Quiet, Settings, build_config, select_set


def finish(
    gallery: GalleryPath,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the lists.", show_default=False)],
    tests: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--test",
            metavar="GALLERY",
            help="Gallery that tests the network: what it shares is rejected. Repeatable.",
            show_default=False,
        ),
    ] = None,
    relabels: Annotated[
        bool, typer.Option("--relabels", help="Relabelled images in the train list, under their new identity.")
    ] = False,
    dataset: Annotated[
        Optional[Format],  # noqa: UP045
        typer.Option(
            "--format", help="Format of a dataset of the images to train on, in OUT/dataset.", show_default="none"
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Write the lists that end the cleaning of a dataset.

    OUT gets train.csv (images to train on: clean, without copies, without what the test galleries hold), rejected.csv
    (path and reason), review.csv (labels to look at) and summary.json. Every image of the gallery is in exactly one of
    the lists. With --format the images to train on are written as a dataset too, each with its bytes as they are.
    Reports of `clean` and `dedup` that are up to date are used; else they are made first. OUT may be a prefix in an
    object store, without --format.

    For example:

        facepipe finish gallery/ lists/ --test lfw/ --test our-test/

        facepipe embed lists/train.csv train/

        facepipe finish gallery/ clean/ --relabels --format rec
    """
    with exit_on_error(REPORT_HINT):
        from pipelines.finish import FinishConfig, run

        options = {"clean": select_set(relabels=relabels or None)}
        chosen = build_config(FinishConfig, config, settings, options)
        summary = run(
            chosen,
            gallery,
            out,
            tests or (),
            make_line_printer("finish", quiet=quiet),
            dataset.value if dataset else None,
        )
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _print_summary(summary: Any) -> None:
    rows = [("images", summary.images), ("train", f"{summary.train} of {summary.identities} identities")]
    if summary.relabelled:
        rows.append(("  under another identity", summary.relabelled))
    rows.append(("rejected", sum(summary.rejected.values())))
    rows += [(f"  {kind}", count) for kind, count in sorted(summary.rejected.items())]
    rows.append(("review", summary.review))
    print_table(f"finished: {summary.gallery} (version {summary.version})", ("list", "images"), rows)
    if summary.other_faces:
        print(f"{summary.other_faces} other faces in labelled photos are no wrong labels, and are not trained on")
    print(f"train list: {summary.out.rstrip('/')}/train.csv; rejected.csv and review.csv beside it")
    if summary.dataset:
        print_left_out(summary.dataset)
        print(f"dataset: {summary.dataset.images} images of {summary.dataset.persons} persons, {summary.dataset.out}")
    print_seconds(summary.seconds)
