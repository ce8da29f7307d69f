"""facepipe cluster"""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from facepipe.config import build, parse_settings, read_toml
from jobs.console import emit, failures, say, table
from jobs.options import ConfigFile, GalleryPath, Json, Settings, given


def cluster(
    gallery: GalleryPath,
    assign: Annotated[
        bool, typer.Option("--assign", help="Put new faces into the clusters there are; ids stay as they are.")
    ] = False,
    algorithm: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Only `linkage`; kept so that old scripts run.", hidden=True),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=2, help="Distance from which two faces are two persons.", show_default="found from the data"
        ),
    ] = None,
    identities: Annotated[bool, typer.Option("--identities", help="Faces with one label are one person.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
) -> None:
    """Find the persons of a gallery: clusters of faces, what may have to be merged or split, and a report.

    Needs no labels and no index. The threshold is found from the distances themselves; two faces of one photo are
    different persons. Writes faces.parquet, clusters.parquet, merges.parquet, splits.parquet and report.html into
    GALLERY/reports/cluster/.

    Example:

        facepipe cluster gallery/

        facepipe cluster gallery/ --threshold 0.35 --set graph.recall=0.995

        facepipe cluster gallery/ --assign
    """
    with failures("the report is what it was before; the same command goes on from the last finished step"):
        from pipelines.cluster import ClusterConfig, run
        from pipelines.cluster.assign import run as assign_new

        asked = {
            "cluster": given(algorithm=algorithm, identities=identities or None),
            "graph": given(threshold=threshold),
        }
        chosen = build(ClusterConfig, read_toml(config) if config else {}, asked, parse_settings(settings or []))
        tell = say("cluster", quiet)
        if assign:
            placed = assign_new(gallery, chosen.cluster.one_photo, tell)
            emit(asdict(placed), as_json, lambda: _show_assigned(placed))
            return
        summary = run(chosen, gallery, tell)
        emit(asdict(summary), as_json, lambda: _show(summary))


def _show(summary: Any) -> None:
    found = "found from the data" if summary.estimated else "given, or the model's own"
    rows = [
        ("faces", summary.faces),
        ("clusters (of one face)", f"{summary.clusters} ({summary.singletons})"),
        ("largest", summary.largest),
        ("threshold", f"{summary.distance:.4f}, {found}"),
        ("edges, recall measured", f"{summary.edges}, {summary.recall:.4f}"),
        ("suspected merges, splits", f"{summary.merges}, {summary.splits}"),
        ("report", f"{summary.out}/report.html"),
    ]
    table(f"clusters by {summary.algorithm}", ("", ""), rows)
    print(", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in summary.seconds.items()))


def _show_assigned(summary: Any) -> None:
    rows = [
        ("new faces", summary.new),
        ("put into clusters", summary.placed),
        ("new clusters", summary.clusters),
        ("gone faces", summary.gone),
    ]
    table("clusters, brought up to date", ("", ""), rows)
    print(f"{summary.seconds:.1f} s")
