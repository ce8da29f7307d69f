"""facepipe clean"""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import emit, failures, say, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings, given


def clean(
    gallery: GalleryPath,
    relabels: Annotated[
        bool, typer.Option("--relabels", help="Put relabelled faces into the clean lists, under their new identity.")
    ] = False,
    min_face_px: Annotated[
        float | None, typer.Option(min=0, help="Smaller faces are of low quality.", show_default="20")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Judge every identity label: keep, outlier, relabel, duplicate, low_quality or review, each with a reason.

    How noisy the labels are is estimated from the corpus itself, and so is how many of the decisions are wrong. Writes
    decisions.parquet, identities.parquet, merges.parquet, the lists clean.csv, clean.txt, msceleb.txt and relabel.csv,
    and report.html into GALLERY/reports/clean/.

    Example:

        facepipe clean gallery/

        facepipe clean gallery/ --relabels --min-face-px 40 --set duplicates.keep=sharpest
    """
    with failures("the report is what it was before; the same command goes on from the last finished step"):
        from pipelines.clean import CleanConfig, run

        asked = {"clean": given(relabels=relabels or None, min_face_px=min_face_px)}
        chosen = build(CleanConfig, read_toml(config) if config else {}, asked, parse_settings(settings or []))
        summary = run(chosen, gallery, say("clean", quiet))
        emit(asdict(summary), as_json, lambda: _show(summary))


def _show(summary: Any) -> None:
    rows = [
        ("labelled faces (without label)", f"{summary.labelled} ({summary.unlabelled})"),
        ("identities", summary.identities),
        ("wrong labels, estimated", f"{summary.wrong:.1f} ({summary.wrong / max(1, summary.labelled):.2%})"),
        *((decision, count) for decision, count in summary.decisions.items()),
        ("expected errors among these", f"{summary.errors:.1f}"),
        ("one person under two names, pairs", summary.merges),
        ("two persons under one name", summary.splits),
        ("in the clean lists", summary.listed),
        ("paths in msceleb.txt are relative to", summary.root or "nothing"),
        ("edge recall", f"{summary.recall:.4f}"),
        ("report", f"{summary.out}/report.html"),
    ]
    if summary.unlisted:
        rows.append(("only in clean.csv: paths with line breaks", summary.unlisted))
    table(f"labels, settled in {summary.rounds} rounds", ("", ""), rows)
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items()))
