"""facepipe evaluate"""

from typing import Annotated, Any

import typer

from jobs.console import emit, failures, table
from jobs.options import GalleryPath, Json

app = typer.Typer(help="Measure a gallery against the truth.", no_args_is_help=True)
_TRUTH = "CSV or Parquet file with identity, and face_id or uri"


@app.command()
def pairs(
    gallery: GalleryPath,
    file: Annotated[
        str,
        typer.Argument(
            metavar="PAIRS", help="LFW's pairs.txt, or a CSV with file_x, file_y, same.", show_default=False
        ),
    ],
    picture: Annotated[
        str | None, typer.Option(metavar="ROC.png", help="Draw the ROC curve.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Verification on pairs: k-fold accuracy with its standard error (LFW View 2), AUC, EER, TAR at fixed FAR.

    Example:

        facepipe evaluate pairs gallery/ pairs.txt --picture roc.png
    """
    with failures():
        from facepipe.evaluation.pairs import evaluate_pairs
        from facepipe.gallery import Gallery

        result = evaluate_pairs(Gallery(gallery), file, picture)
        emit(result.to_dict(), as_json, lambda: _show(file, result))


def _show(file: str, result: Any) -> None:
    rows = [
        ("pairs", result.pairs),
        ("pairs without a face, decided as different", result.without_face),
        ("accuracy", f"{result.accuracy:.4f} ± {result.standard_error:.4f} ({result.folds} folds)"),
        ("threshold (distance, over all pairs)", f"{result.threshold:.4f}"),
        ("AUC", f"{result.auc:.5f}"),
        ("EER", f"{result.eer:.4f}"),
    ]
    for far, tar in result.tar.items():
        shown = (
            "too few impostor pairs" if tar is None else f"{tar:.4f} (distance <= {result.thresholds[far] or 0:.4f})"
        )
        rows.append((f"TAR at FAR {far}", shown))
    table(f"pairs {file}", ("", ""), rows)


@app.command()
def index(
    gallery: GalleryPath,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Faces of the gallery to search with.", show_default="by its size")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(min=0, max=1, help="Recall@10 to search with.", show_default="the index's")
    ] = None,
    picture: Annotated[
        str | None, typer.Option(metavar="RECALL.png", help="Draw recall against lists visited.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """The search index: recall against exact search, queries a second, bytes a vector; identification where labels are.

    Example:

        facepipe evaluate index gallery/ --picture recall.png
    """
    with failures():
        from facepipe.evaluation.index import evaluate_index
        from facepipe.gallery import Gallery

        result = evaluate_index(Gallery(gallery), queries, recall, picture)
        emit(result.to_dict(), as_json, lambda: _show_index(gallery, result))


def _show_index(gallery: str, result: Any) -> None:
    rows = [
        ("faces, shards, deleted in them", f"{result.faces}, {result.shards}, {result.dead}"),
        ("factory", result.factory),
        ("lists visited, candidates re-scored", f"{result.nprobe}, {result.rescore}"),
        (f"recall@1, {result.queries} queries", f"{result.recall_at_1:.4f}"),
        (f"recall@10 ({result.asked:g} asked)", f"{result.recall_at_10:.4f} ± {result.standard_error:.4f}"),
        ("queries/s in a batch", f"{result.qps:.0f}"),
        ("queries/s against every vector", f"{result.exact_qps:.0f}"),
        ("one query alone", f"{result.single_ms:.2f} ms"),
        ("bytes a vector: index, side files", f"{result.bytes_per_vector:.1f}, {result.side_bytes_per_vector:.1f}"),
        ("imbalance of the lists", f"{result.imbalance:.3f}"),
    ]
    people = result.identification
    if people is not None:
        rows += [("rank-1 identification", f"{people.rank_1:.4f} of {people.mated} mated searches")]
        for point in people.points:
            missed = "no mated searches" if point.fnir is None else f"{point.fnir:.4f}"
            rows.append((f"FNIR at FPIR {point.fpir:g}", f"{missed} (distance <= {point.threshold:.4f})"))
    table(f"index of {gallery}", ("", ""), rows)
    points = ((p.nprobe, p.rescore, f"{p.recall_at_1:.4f}", f"{p.recall_at_10:.4f}") for p in result.curve)
    table("measured, lower bounds of 95 %", ("lists", "re-scored", "recall@1", "recall@10"), points)
    for note in result.notes:
        print(note)


@app.command()
def clusters(
    gallery: GalleryPath,
    file: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="FACES.parquet",
            help="Clusters, as face_id and cluster.",
            show_default="those of facepipe cluster",
        ),
    ] = None,
    truth: Annotated[
        str | None, typer.Option(metavar="TRUTH", help=f"{_TRUTH}.", show_default="the gallery's own labels")
    ] = None,
    as_json: Json = False,
) -> None:
    """Clusters against identities: precision, recall and F over pairs and by BCubed, NMI, sizes.

    Of a photo with several faces only the largest counts, unless the truth names faces by face_id.

    Example:

        facepipe evaluate clusters gallery/ --truth people.csv
    """
    with failures():
        from facepipe.evaluation.clusters import evaluate_clusters
        from facepipe.gallery import Gallery

        result = evaluate_clusters(Gallery(gallery), file, truth)
        emit(result.to_dict(), as_json, lambda: _show_clusters(gallery, result))


def _show_clusters(gallery: str, result: Any) -> None:
    scores = result.scores
    rows = [
        ("faces, identities", f"{scores.faces}, {scores.identities}"),
        ("clusters, of one face", f"{scores.clusters}, {scores.singletons}"),
        ("faces of the largest cluster", scores.largest),
        ("pairs: precision, recall, F", _rates(scores.pairwise)),
        ("BCubed: precision, recall, F", _rates(scores.bcubed)),
        ("NMI", f"{scores.nmi:.4f}"),
        ("left out: smaller faces of a photo", result.left_out),
        ("left out: labelled, but in no cluster", result.without_cluster),
        ("left out: in a cluster, but without a label", result.without_label),
    ]
    table(f"clusters of {gallery}", ("", ""), rows)


@app.command()
def clean(
    gallery: GalleryPath,
    truth: Annotated[
        str,
        typer.Argument(metavar="TRUTH", help=f"{_TRUTH}; an empty identity is nobody in the set.", show_default=False),
    ],
    file: Annotated[
        str | None,
        typer.Option(
            "--table",
            metavar="DECISIONS.parquet",
            help="Decisions, as face_id, identity, decision, suggested, noise.",
            show_default="those of facepipe clean",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Decisions on labels against the truth: how many wrong labels are found and repaired, and whether the noise holds.

    Found is what is decided outlier or relabel, or review with a noise above 0.5. Where the truth names photos by uri,
    only the largest face of each counts.

    Example:

        facepipe evaluate clean gallery/ truth.csv
    """
    with failures():
        from facepipe.evaluation.cleaning import evaluate_clean
        from facepipe.gallery import Gallery

        result = evaluate_clean(Gallery(gallery), truth, file)
        emit(result.to_dict(), as_json, lambda: _show_clean(gallery, result))


def _show_clean(gallery: str, result: Any) -> None:
    rows = [
        ("faces, wrong labels, flagged", f"{result.faces}, {result.wrong}, {result.flagged}"),
        ("detection: precision, recall, F", _rates(result.detection)),
        ("average precision by noise", _share(result.average_precision, "no wrong label")),
        ("wrong labels relabelled rightly", _share(result.repaired, "no wrong label")),
        ("relabels that are right", _share(result.relabels_right, "no relabel")),
        ("errors that the noise predicts, real ones", f"{result.expected_errors:.1f}, {result.errors}"),
        ("left out: smaller faces of a photo", result.left_out),
        ("left out: decided, but without a truth", result.without_truth),
        ("left out: decided, but without a label", result.without_label),
        ("left out: in the truth, but not decided", result.without_decision),
    ]
    table(f"labels of {gallery}", ("", ""), rows)
    counts = ((decision, found["right"], found["wrong"]) for decision, found in result.counts.items())
    table("labels by decision", ("decision", "right", "wrong"), counts)


def _rates(rates: Any) -> str:
    return f"{rates.precision:.4f}, {rates.recall:.4f}, {rates.f:.4f}"


def _share(share: float | None, without: str) -> str:
    return without if share is None else f"{share:.4f}"
