"""The command `facepipe cluster`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import REPORT_HINT, exit_on_error, make_line_printer, print_result, print_seconds, print_table
from jobs.options import (
    ConfigFile,
    GalleryPath,
    HelpSettings,
    Json,
    Quiet,
    Settings,
    build_config,
    select_set,
)


def cluster(
    gallery: GalleryPath,
    assign: Annotated[
        bool, typer.Option("--assign", help="Assignment of new faces to existing clusters, whose ids stay.")
    ] = False,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids", help="Ids of the earlier clusters kept; without it the largest is number 0.")
    ] = False,
    algorithm: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Clustering algorithm; only linkage, kept so that old scripts run.", hidden=True),
    ] = None,
    threshold: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            min=0,
            max=2,
            help="Distance above which two faces are different people.",
            show_default="estimated from the data",
        ),
    ] = None,
    identities: Annotated[
        bool, typer.Option("--identities", help="Faces with the same label always in one cluster.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    config: ConfigFile = None,
    settings: Settings = None,
    help_settings: HelpSettings = False,
) -> None:
    """Group the faces of a gallery by person.

    The report also lists clusters that probably need a merge or a split. The command needs no labels and no index. The
    threshold is estimated from the distances themselves. Two faces of one photo are different people. What people have
    decided holds exactly. Writes faces.parquet, clusters.parquet, persons.parquet, left_out.parquet, merges.parquet,
    splits.parquet and report.html into GALLERY/reports/cluster/.

    For example:

        facepipe cluster gallery/

        facepipe cluster gallery/ --threshold 0.35 --set graph.recall=0.995

        facepipe cluster gallery/ --assign

        facepipe cluster gallery/ --keep-ids
    """
    with exit_on_error(REPORT_HINT):
        from pipelines.cluster import ClusterConfig, run
        from pipelines.cluster.assign import run as assign_new

        options = {
            # A flag that is not given must not override the file, so False becomes None.
            "cluster": select_set(algorithm=algorithm, identities=identities or None),
            "graph": select_set(threshold=threshold),
        }
        chosen = build_config(ClusterConfig, config, settings, options)
        on_progress = make_line_printer("cluster", quiet=quiet)
        # The assignment takes its threshold from the report, and only the rule for photos from the config.
        if assign:
            assigned = assign_new(gallery, chosen.cluster.one_photo, on_progress, chosen.cluster)
            print_result(asdict(assigned), as_json=as_json, print_text=lambda: _print_assigned(assigned))
            return
        summary = run(chosen, gallery, on_progress, keep_ids=keep_ids)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_summary(summary))


def _print_summary(summary: Any) -> None:
    # Tell how the threshold was found, because the whole result depends on it.
    origin = "estimated from the data" if summary.estimated else "set, or the model's own"
    rows = [
        ("faces", summary.faces),
        ("clusters (of one face)", f"{summary.clusters} ({summary.singletons})"),
        ("largest", summary.largest),
        ("threshold", f"{summary.distance:.4f}, {origin}"),
        ("edges, recall measured", f"{summary.edges}, {summary.recall:.4f}"),
        ("suspected merges, splits", f"{summary.merges}, {summary.splits}"),
    ]
    # Nobody who has decided nothing needs to know of names.
    if summary.named or summary.left_out:
        rows.append(("persons with a name", summary.named))
        rows.append(("faces left out by decision", summary.left_out))
    print_table(f"clusters by {summary.algorithm}", ("", ""), rows)
    print(f"report: {summary.out}/report.html")
    print_seconds(summary.seconds)


def _print_assigned(summary: Any) -> None:
    rows = [
        ("new faces", summary.new),
        ("put into clusters", summary.placed),
        ("new clusters", summary.clusters),
        ("removed faces", summary.gone),
        *([("moved by decision", summary.moved)] if summary.moved else []),
        ("clustered anew, numbers kept", "yes" if summary.anew else "no"),
        ("faces now per face clustered", f"{summary.growth:.2f}" if summary.growth else "unknown"),
        ("faces since then without a cluster", f"{summary.unplaced:.1%}"),
        ("threshold of the clusters", f"{summary.distance:.4f}" if summary.distance else "unknown"),
    ]
    print_table("clusters, updated", ("", ""), rows)
    if summary.advice:
        print(summary.advice)
    print(f"{summary.seconds:.1f} s")
