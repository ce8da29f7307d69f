"""The command `facepipe adopt`."""

from typing import Annotated, Any, Optional

import typer

from jobs.console import ExitCode, exit_on_error, fail, print_result, print_table
from jobs.options import GalleryPath, Json, NameRole, Quiet, select_set
from jobs.progress import ProgressReporter

# How far the norms of normalised encodings may be from 1.
_UNIT_TOLERANCE = 1e-3


def adopt(
    encodings: Annotated[
        str,
        typer.Argument(
            metavar="ENCODINGS",
            help="Encodings: a Parquet file or folder (columns encoding, name, identity, ...), an .npz with arrays "
            "encodings and names, an .npy, or a .bin of raw float32 numbers.",
            show_default=False,
        ),
    ],
    gallery: GalleryPath,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Name of the corpus in the gallery.", show_default="the file's name"),
    ] = None,
    names: Annotated[
        NameRole,
        typer.Option(help="What a column `name` holds; auto: images if another column has identities, else people."),
    ] = "auto",
    detector: Annotated[
        str, typer.Option(metavar="MODEL", help="Detector for photos that are added later.")
    ] = "dlib-hog",
    embedder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="MODEL",
            help="Embedder that computes the same encodings, or features:NAME for one that is not here.",
            show_default="face-recognition for 128 numbers, else features:FILE",
        ),
    ] = None,
    labels: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="File of a label per line, for a .bin.", show_default=False),
    ] = None,
    dim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=64, max=1024, help="Numbers per vector.", show_default="the file's"),
    ] = None,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Largest share of refused rows; above it the exit code is 3.")
    ] = 0.0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add encodings that another program computed to a gallery.

    The photos of the encodings are not needed. Photos that are later embedded with the same models are compared with
    them. Adopting a file again adds nothing; after a crash it resumes where it stopped. Rows that are not an encoding
    (NaN, another length) are refused and counted. Pickle files are not opened: the error message says how to convert
    one.

    A .bin holds raw float32 numbers, as the feature files of the face-clustering literature do. How many make a vector
    follows from the labels, or --dim says it. Vectors of different models are never mixed: name the model of a second
    file as the gallery does, if it is the same.

    For example:

        facepipe adopt known_faces.npz gallery/

        facepipe adopt encodings.parquet gallery/ --source staff-2023 --names images

        facepipe adopt part1_test.bin gallery/ --labels part1_test.meta

        facepipe embed new-photos/ gallery/ --detector dlib-hog --embedder face-recognition --set embed.flip=false
    """
    with exit_on_error():
        from pipelines.adopt import AdoptConfig, run

        options = select_set(source=source, detector=detector, embedder=embedder, labels=labels, dim=dim)
        config = AdoptConfig(encodings, names=names, **options)
        with ProgressReporter("adopt", quiet=quiet) as progress:
            summary = run(config, gallery, lambda adopted: progress.update(_format_counts(adopted)))
        print_result(summary.to_dict(), as_json=as_json, print_text=lambda: _print_summary(summary, gallery))
        # If every row is refused, the file is likely of another kind, so the first reason is shown.
        if summary.failed == summary.listed:
            fail(f"all {summary.listed} rows were refused: {summary.examples[0]}", ExitCode.FAILED)
        if summary.failed > max_failed * summary.listed:
            fail(
                f"{summary.failed} of {summary.listed} rows were refused, more than --max-failed {max_failed:g}",
                ExitCode.OVER_BUDGET,
            )


def _format_counts(summary: Any) -> str:
    return f"{summary.listed} rows, {summary.adopted} adopted, {summary.failed} refused"


def _print_summary(summary: Any, gallery: str) -> None:
    # Counts, of which the rare ones are shown only if there are any.
    rows = [("rows", summary.listed), ("adopted", summary.adopted)]
    if summary.replaced:
        rows.append(("of these, replaced others", summary.replaced))
    rows.append(("already in the gallery", summary.skipped))
    if summary.repeated:
        rows.append(("listed twice", summary.repeated))
    if summary.erased:
        rows.append(("erased earlier, skipped", summary.erased))
    for reason, count in sorted(summary.refused.items()):
        rows.append((f"refused: {reason.replace('_', ' ')}", count))
    print_table(f"adopt -> {gallery} (version {summary.version})", ("", "count"), rows)

    # Which column was used for what, and whether the encodings look like those of face_recognition.
    print("; ".join(summary.columns))
    if summary.adopted:
        print(f"norms {summary.norm_least:.4f} to {summary.norm_most:.4f}, mean {summary.norm_mean:.4f}")
        if abs(summary.norm_least - 1) < _UNIT_TOLERANCE and abs(summary.norm_most - 1) < _UNIT_TOLERANCE:
            print("the encodings are normalised already; those of face_recognition itself have norms above 1")
    for example in summary.examples:
        print(f"refused: {example}")
