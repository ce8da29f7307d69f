"""The command `facepipe search`."""

import sys
from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.errors import ConfigError
from jobs.console import exit_on_error, print_result, print_table
from jobs.options import (
    ConfigFile,
    Decide,
    Detector,
    Embedder,
    GalleryPath,
    HelpSettings,
    Json,
    Quiet,
    Settings,
    build_config,
    build_model_sections,
    select_set,
)
from jobs.progress import ProgressReporter, format_search_rate


def search(
    gallery: GalleryPath,
    queries: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="QUERIES",
            help="Images (whatever embed takes), a gallery, or Parquet with a column `embedding` or `vector`.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="OUT.parquet", help="File for the answers; without .parquet a folder of parts.", show_default=False
        ),
    ] = None,
    k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("-k", "--k", min=1, help="Neighbours per query.", show_default="10"),
    ] = None,
    radius: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Distance within which faces are returned, instead of k.", show_default=False),
    ] = None,
    recall: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            max=1,
            help="Share to find of the k nearest, or within the radius.",
            show_default="the index's",
        ),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Maximum distance for a match; anything farther is Unknown.", show_default=False),
    ] = None,
    calibrate: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FPIR=RATE",
            help="Rate of false alarms to choose the threshold for, from searches in the gallery itself.",
            show_default=False,
        ),
    ] = None,
    decide: Annotated[
        Optional[Decide],  # noqa: UP045
        typer.Option(
            help="Identification by the nearest face, or by a vote of all neighbours.", show_default="nearest"
        ),
    ] = None,
    detector: Detector = None,
    embedder: Embedder = None,
    exact: Annotated[bool, typer.Option("--exact", help="Comparison with every face instead of an index.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Find the nearest faces of each query, and identify it.

    Run an interrupted search again to resume from the last finished block. With --calibrate but without QUERIES, only
    the threshold is chosen and printed, with the share of faces it misses.

    For example:

        facepipe search gallery/ new_photos/ hits.parquet

        facepipe search gallery/ queries.parquet hits.parquet -k 50 --recall 0.99

        facepipe search gallery/ --calibrate FPIR=0.001

        facepipe search gallery/ new_photos/ who.parquet --calibrate FPIR=0.001 --decide vote
    """
    with exit_on_error():
        from facepipe.gallery import Gallery
        from pipelines.search import SearchConfig, run

        # Check the combination of arguments before anything is read.
        if calibrate is not None and threshold is not None:
            raise ConfigError("--threshold and --calibrate both set the threshold: leave out one of them")
        if (queries is None or out is None) and (calibrate is None or queries is not None):
            raise ConfigError("search needs GALLERY QUERIES OUT.parquet; only with --calibrate is GALLERY alone enough")

        # Choose the threshold, and stop there if there is nothing to search for.
        point = _choose_threshold(gallery, calibrate, recall) if calibrate else None
        if queries is None or out is None:
            if as_json and point is not None:
                print_result(point.to_dict(), as_json=True, print_text=lambda: None)
            return

        # Options that are not given stay out of the config, so that the file or the defaults hold.
        options = {
            "search": select_set(
                k=k,
                radius=radius,
                recall=recall,
                threshold=threshold if point is None else point.threshold,
                decide=decide,
                path="scan" if exact else None,
            ),
            "embed": build_model_sections(detector, embedder),
        }
        if detector or embedder:
            Gallery(gallery).contract.require_models(detector, embedder)
        chosen = build_config(SearchConfig, config, settings, options)
        with ProgressReporter("search", quiet=quiet) as progress:
            summary = run(chosen, gallery, queries, out, lambda searched: progress.update(format_search_rate(searched)))
        for note in summary.notes:
            print(f"facepipe: {note}", file=sys.stderr)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _choose_threshold(gallery: str, calibrate: str, recall: float | None) -> Any:
    """Choose the threshold for the rate in `--calibrate`, and print it on stderr.

    Returns:
        The operating point that `facepipe.evaluation.identification.choose_threshold` returns.
    """
    from facepipe.decisions.gallery import DecidedGallery
    from facepipe.evaluation.identification import choose_threshold

    point = choose_threshold(DecidedGallery(gallery), _parse_fpir(calibrate), recall)
    print(_format_point(point, is_unstable=point.has_few_alarms), file=sys.stderr)
    return point


def _parse_fpir(text: str) -> float:
    """Parse `FPIR=RATE`, or the rate alone."""
    # A text that is no number becomes a rate of 0, which the check below refuses.
    name, _, value = text.rpartition("=")
    try:
        fpir = float(value)
    except ValueError:
        fpir = 0.0
    if name.upper() not in ("", "FPIR") or not 0 < fpir < 1:
        raise ConfigError(f"--calibrate={text!r} is not FPIR=RATE: write a rate between 0 and 1, such as FPIR=0.001")
    return fpir


def _format_point(point: Any, *, is_unstable: bool) -> str:
    text = f"threshold {point.threshold:.4f}: {point.false_alarms} false alarms in {point.probes} searches"
    text += f" (FPIR {point.fpir:g}); "
    # Misses are counted on faces whose person has another face in the gallery.
    if point.fnir is None:
        text += "the share of misses is unknown, because no identity has two faces"
    else:
        text += f"misses {point.fnir:.2%} of the faces whose identity is in the gallery (FNIR)"
    if is_unstable:
        text += "; too few false alarms for a stable estimate: label more faces, or choose a higher FPIR"
    return text


def _format_recall(summary: Any) -> str:
    if summary.recall is None:
        return "not measured: `facepipe index` measures it"
    return "1, exact" if summary.path == "scan" else f"{summary.recall:.4f} or better"


def _print_summary(summary: Any) -> None:
    # Print figures of the search, then inputs that could not be searched, then identifications.
    visited = f"{summary.nprobe} lists, {summary.rescore} re-scored"
    rows = [
        ("queries", summary.queries),
        ("answers", summary.rows),
        ("faces in the index", summary.vectors),
        ("method", "every face compared" if summary.path == "scan" else visited),
        (f"{summary.recall_of}, measured", _format_recall(summary)),
    ]
    rows += [(f"images: {status}", count) for status, count in summary.images.items()]
    rows += [(f"queries not searched: {reason}", count) for reason, count in summary.bad.items()]
    if summary.placement_reason:
        rows.append(("shards", f"{summary.placement}: {summary.placement_reason}"))
    rows.append(("blocks (finished earlier)", f"{summary.blocks} ({summary.skipped_blocks})"))
    if summary.threshold is not None:
        rows.append((f"identified (within {summary.threshold:.4f})", summary.identified))
        rows.append(("Unknown", summary.unknown))
    print_table(f"search -> {summary.out}", ("", ""), rows)
    print(f"{summary.seconds:.1f} s")
