"""facepipe adopt"""

import time
from typing import Annotated, Any, Literal, Optional

import typer

from jobs.console import FAILED, OVER_BUDGET, emit, fail, failures, say, table
from jobs.options import GalleryPath, Json, given

_LINE_SECONDS = 5.0
_UNIT = 1e-3


def adopt(
    encodings: Annotated[
        str,
        typer.Argument(
            metavar="ENCODINGS",
            help="128-D encodings: a Parquet file or folder (columns encoding, name, identity, ...), an .npz with "
            "arrays encodings and names, or an .npy.",
            show_default=False,
        ),
    ],
    gallery: GalleryPath,
    source: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Name of the corpus in the gallery.", show_default="the file's name"),
    ] = None,
    names: Annotated[
        Literal["auto", "people", "images"],
        typer.Option(help="What a column name names; auto: images where another column says who it is, else people."),
    ] = "auto",
    detector: Annotated[
        str, typer.Option(metavar="MODEL", help="Detector for the photos that come later.")
    ] = "dlib-hog",
    embedder: Annotated[
        str, typer.Option(metavar="MODEL", help="Embedder that computes the same encodings.")
    ] = "face-recognition",
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that may be refused before exit code 3.")
    ] = 0.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Take over encodings that face_recognition computed, where the photos are no longer at hand.

    Photos embedded with the same models are compared with them from then on. Adopting a file again adds nothing; after
    a crash it goes on where it stopped. Rows that are no encoding (NaN, another length) are refused and counted.
    Pickle files are not opened: the message says how to convert one.

    Example:

        facepipe adopt known_faces.npz gallery/

        facepipe adopt encodings.parquet gallery/ --source staff-2023 --names images

        facepipe embed new-photos/ gallery/ --detector dlib-hog --embedder face-recognition --set embed.flip=false
    """
    with failures():
        from pipelines.adopt import AdoptConfig, run

        models = {"detector": detector, "embedder": embedder}
        config = AdoptConfig(encodings, names=names, **given(source=source, **models))
        summary = run(config, gallery, _Lines(quiet))
        emit(summary.to_dict(), as_json, lambda: _show(summary, gallery))
        if summary.failed == summary.listed:
            fail(f"all {summary.listed} rows were refused: {summary.examples[0]}", FAILED)
        if summary.failed > max_failed * summary.listed:
            fail(
                f"{summary.failed} of {summary.listed} rows were refused, more than --max-failed {max_failed:g}",
                OVER_BUDGET,
            )


class _Lines:
    """A line of progress every few seconds."""

    def __init__(self, quiet: bool):
        self._say, self._last = say("adopt", quiet), time.monotonic()

    def __call__(self, summary: Any) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            self._say(f"{summary.listed} rows, {summary.adopted} adopted, {summary.failed} refused")


def _show(summary: Any, gallery: str) -> None:
    rows = [("rows", summary.listed), ("adopted", summary.adopted)]
    rows += [("of these, in place of others", summary.replaced)] if summary.replaced else []
    rows += [("already in the gallery", summary.skipped)]
    rows += [("listed twice", summary.repeated)] if summary.repeated else []
    rows += [("erased before, left out", summary.erased)] if summary.erased else []
    rows += [(f"refused: {reason.replace('_', ' ')}", count) for reason, count in sorted(summary.refused.items())]
    table(f"adopt -> {gallery} (version {summary.version})", ("", "count"), rows)
    print("; ".join(summary.columns))
    if summary.adopted:
        print(f"norms {summary.norm_least:.4f} to {summary.norm_most:.4f}, mean {summary.norm_mean:.4f}")
        if abs(summary.norm_least - 1) < _UNIT and abs(summary.norm_most - 1) < _UNIT:
            print("the encodings had been normalised before: face_recognition's own have norms above 1")
    for example in summary.examples:
        print(f"refused: {example}")
