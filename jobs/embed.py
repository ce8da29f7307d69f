"""The command `facepipe embed`."""

import shlex
from typing import Annotated, Any, Optional

import typer

from facepipe import storage
from facepipe.observe.gpu_usage import GpuFigures
from jobs.console import ExitCode, exit_on_error, fail, make_line_printer, print_result, print_table
from jobs.options import (
    ConfigFile,
    Detector,
    Embedder,
    GalleryPath,
    HelpSettings,
    IdentityRule,
    Json,
    Quiet,
    Runner,
    Settings,
    build_config,
    build_model_sections,
    select_set,
)
from jobs.progress import ProgressReporter, format_embed_rate, format_failed, show_embedding


def embed(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, glob, s3:// prefix, .parquet file or folder, .tar, .zip, .rec, or a list (.txt, .csv, .tsv).",
            show_default=False,
        ),
    ],
    gallery: GalleryPath,
    identity: Annotated[
        Optional[IdentityRule],  # noqa: UP045
        typer.Option(help="Origin of identity labels.", show_default="auto"),
    ] = None,
    label_column: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="Column of a list or table that holds the label; in a list without a header its number from 1.",
            show_default="the first known one",
        ),
    ] = None,
    label_prefix: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TEXT", help="Text before each label, if other sources number other people.", show_default="none"
        ),
    ] = None,
    runner: Annotated[
        Optional[Runner],  # noqa: UP045
        typer.Option(
            help="How to run the work: inline is this process, local is processes on this machine.", show_default="auto"
        ),
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Number of worker processes.", show_default="one per CPU or GPU"),
    ] = None,
    detector: Detector = None,
    embedder: Embedder = None,
    aligned: Annotated[
        bool,
        typer.Option("--aligned", help="Images are aligned crops already, such as 112x112: run no detector."),
    ] = False,
    boxes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="List of the faces of images, which no detector then searches: CSV of boxes or landmarks, or COCO's "
            "JSON; repeatable.",
            show_default=False,
        ),
    ] = None,
    retry: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="A,B,C",
            help="Statuses of which all images are tried again: decode_error, too_large, no_face, crashed.",
            show_default="those whose decoder, limit or setting has changed",
        ),
    ] = None,
    no_thumbs: Annotated[bool, typer.Option("--no-thumbs", help="No thumbnails of faces in the gallery.")] = False,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of failed images; above it the exit code is 3.")
    ] = 1.0,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Detect, align and embed the faces of a corpus.

    Run it again to embed only what is new or has changed; after a crash it resumes where it stopped. A failed image is
    recorded with a status and a reason; it does not stop the run. It is tried again if the decoder, the limit or the
    setting that failed it has changed.

    For example:

        facepipe embed photos/ gallery/

        facepipe embed 's3://bucket/faces' gallery/ --identity folder --runner ray

        facepipe embed photos/ gallery/ --embedder models/mobilefacenet.toml

        facepipe embed faces_emore/train.rec gallery/ --aligned

        facepipe embed VGGFace2/train gallery/ --boxes loose_bb_train.csv --boxes loose_landmark_train.csv

        facepipe embed casia.txt gallery/ --set source.root=/data/casia --set detect.min_score=0.5

        facepipe embed photos/ gallery/ --set decode.max_pixels=200000000 --retry decode_error,crashed

        facepipe embed vggface2.csv gallery/ --label-column class_id --label-prefix vgg-

        facepipe embed photos/ gallery/ --set source.exclude='["*_thumb.jpg", "drafts"]'
    """
    with exit_on_error():
        from facepipe.models.zoo.registry import ALIGNED
        from pipelines.embed import EmbedConfig, run

        if aligned and detector is not None:
            fail("--aligned runs no detector: leave --detector out", ExitCode.USAGE)
        if aligned and boxes:
            fail("--aligned knows where faces are: leave --boxes out", ExitCode.USAGE)
        # Options override the config file only if they are given.
        options = {
            "source": select_set(
                uri=source,
                identity=identity,
                label_column=label_column,
                label_prefix=label_prefix,
                boxes=tuple(boxes) if boxes else None,
            ),
            "run": select_set(runner=runner, workers=workers),
            "align": {"thumbs": False} if no_thumbs else {},
            "retry": {"statuses": [word.strip() for word in retry.split(",")]} if retry else {},
            **build_model_sections(ALIGNED if aligned else detector, embedder),
        }
        chosen = build_config(EmbedConfig, config, settings, options)
        print_line = make_line_printer("embed")
        if chosen.warning:
            print_line(chosen.warning)
        with ProgressReporter("embed", quiet=quiet) as progress:
            summary = run(chosen, gallery, lambda embedded: show_embedding(progress, embedded))
        for note in summary.notes:
            print_line(note)
        print_result(summary.to_dict(), as_json=as_json, print_text=lambda: _print_summary(summary, gallery))
        # If every image failed, the cause is likely not the images, so the run counts as failed whatever is allowed.
        if summary.failed == summary.listed > 0:
            fail(f"all {summary.images} images failed; `facepipe info {gallery}` lists why", ExitCode.FAILED)
        if summary.failed > max_failed * max(1, summary.images):
            fail(
                f"{summary.failed} of {summary.images} images failed, more than --max-failed {max_failed:g}",
                ExitCode.OVER_BUDGET,
            )


def _print_summary(summary: Any, gallery: str) -> None:
    # Rows of rare cases are shown only if there are any.
    rows = [("listed", summary.listed), ("already in the gallery", summary.skipped)]
    if summary.retried:
        rows.append(("tried again", summary.retried))
    if summary.repeated:
        rows.append(("listed twice", summary.repeated))
    if summary.erased:
        rows.append(("erased earlier, skipped", summary.erased))
    rows += [(f"images: {status}", count) for status, count in sorted(summary.statuses.items())]
    if summary.relabelled:
        rows.append(("relabelled by the source", summary.relabelled))
    if summary.relocated:
        rows.append(("of a source that is elsewhere now", summary.relocated))
    if summary.missing:
        rows.append(("missing from the source, marked", summary.missing))
    rows += [("faces", summary.faces), ("other files, skipped", summary.ignored)]
    print_table(f"embed -> {gallery} (version {summary.version})", ("", "count"), rows)
    if summary.gpu:
        print(GpuFigures(**summary.gpu))
    for line in format_ending(summary, gallery):
        print(line)


def format_ending(summary: Any, gallery: str) -> list[str]:
    """Format how an embedding ended: what came in, was added and failed, where the result lies, and what to do next.

    Args:
        summary: its `pipelines.embed.EmbedSummary`.
        gallery: folder of the gallery, as the user wrote it.
    """
    name = shlex.quote(gallery)
    workers = "1 worker" if summary.workers == 1 else f"{summary.workers} workers"
    lines = [f"in: {format_embed_rate(summary)}; {workers}, {summary.runner}, {summary.seconds:.1f} s"]
    lines.append(f"added: {summary.faces:,} faces in {summary.rows:,} rows")
    if summary.failed:
        failed = format_failed(summary.failed, summary.failed_examples)
        lines.append(f"failed: {failed}; `facepipe info {name} --failed` names all")
    lines.append(f"gallery: {storage.to_absolute(gallery)}, version {summary.version}")
    next_command = "index" if summary.rows else "info"
    lines.append(f"next: facepipe {next_command} {name}")
    return lines
