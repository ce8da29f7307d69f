"""The commands `facepipe evaluate pairs`, `templates`, `index`, `clusters` and `clean`."""

from enum import StrEnum
from typing import Annotated, Any, Optional

import typer

from jobs.console import exit_on_error, print_result, print_table
from jobs.options import GalleryPath, Json

app = typer.Typer(help="Measure a gallery against the truth.", no_args_is_help=True)
_TRUTH = "CSV or Parquet file with identity, and face_id or uri"


@app.command()
def pairs(
    gallery: GalleryPath,
    file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="PAIRS",
            help="Pairs file: LFW's, RFW's, CPLFW's, CFP's, a .bin, or a CSV with file_x, file_y, same.",
            show_default=False,
        ),
    ] = None,
    draw: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=2, metavar="COUNT", help="Number of pairs to draw from the gallery's identities.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of --draw.")] = 0,
    write: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="PAIRS.csv", help="CSV file for the pairs of --draw.", show_default=False),
    ] = None,
    picture: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="ROC.png", help="Picture of the ROC curve.", show_default=False),
    ] = None,
    group_folder: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            metavar="LEVEL",
            help="Figures per group of people, the name of a folder above the image: 1 its own, 2 the one above, as in "
            "African/m.0107_f/1.jpg.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure verification on pairs of images.

    Figures are k-fold accuracy with its standard error (LFW View 2), AUC, EER, and TAR at fixed FAR. Without a pairs
    file, --draw makes pairs from the gallery's labels: half of one person, half of two. An image stands for its
    subject, an image that two identities have is left out, and nobody is in many more pairs than the others.

    For example:

        facepipe evaluate pairs gallery/ pairs.txt --picture roc.png

        facepipe evaluate pairs gallery/ --draw 3000 --write pairs.csv

        facepipe evaluate pairs rfw/ African_pairs.txt --group-folder 2
    """
    with exit_on_error():
        from facepipe.decisions.gallery import DecidedGallery
        from facepipe.errors import ConfigError
        from facepipe.evaluation.draw_pairs import draw_pairs, write_pairs
        from facepipe.evaluation.pairs import evaluate_list, evaluate_pairs

        opened = DecidedGallery(gallery)
        if (file is None) == (draw is None):
            raise ConfigError("which pairs? Name a pairs file, or set --draw COUNT to draw them from the labels")
        if write is not None and draw is None:
            raise ConfigError("--write saves the pairs of --draw: set --draw COUNT")
        if file is not None:
            title = f"pairs {file}"
            result = evaluate_pairs(opened, file, picture, group_folder)
            summary = result.to_dict()
        else:
            title = f"pairs drawn from {gallery}, seed {seed}"
            drawn = draw_pairs(opened, draw or 0, seed)
            result = evaluate_list(opened, drawn, title, picture, group_folder)
            summary = result.to_dict() | {"requested": draw, "seed": seed, "written": write}
            # The file is written last: there is none of pairs that cannot be scored.
            if write is not None:
                write_pairs(write, drawn)
        print_result(summary, as_json=as_json, print_text=lambda: _print_pairs(title, result, draw))
        if write is not None and not as_json:
            print(f"the pairs are in {write}")


def _print_pairs(title: str, result: Any, requested: int | None) -> None:
    rows = [
        ("pairs", result.pairs if requested is None else f"{result.pairs} of {requested} requested"),
        ("pairs without a face, decided as different", result.without_face),
        ("accuracy", f"{result.accuracy:.4f} ± {result.standard_error:.4f} ({result.folds} folds)"),
        ("threshold (distance, over all pairs)", f"{result.threshold:.4f}"),
        ("AUC", f"{result.auc:.5f}"),
        ("EER", f"{result.eer:.4f}"),
    ]
    # A rate of false matches needs enough pairs of different persons to be measured.
    for far, tar in result.tar.items():
        if tar is None:
            shown = "too few impostor pairs"
        else:
            shown = f"{tar:.4f} (distance <= {result.thresholds[far] or 0:.4f})"
        rows.append((f"TAR at FAR {far}", shown))
    print_table(title, ("", ""), rows)
    if result.groups:
        _print_groups(result)


def _print_groups(result: Any) -> None:
    """Print, per group, what the thresholds of all pairs do."""
    fars = [far for far, threshold in result.thresholds.items() if threshold is not None]
    columns = ["group", "of one person, of two", *(f"TAR, FMR at FAR {far}" for far in fars)]
    rows = []
    for group in result.groups:
        cells = [
            f"{_format_share(group.tar[far], '-')}, {_format_share(group.fmr[far], '-')} "
            f"({_format_share(group.fmr_low[far], '-')} to {_format_share(group.fmr_high[far], '-')})"
            for far in fars
        ]
        rows.append([group.group, f"{group.genuine}, {group.impostors}", *cells])
    print_table("per group, at the thresholds of all pairs (95 % intervals)", tuple(columns), rows)
    if result.across:
        print(f"{result.across} pairs are of two groups, and in none of these rows")


class TemplateWeight(StrEnum):
    """What an image's vector is multiplied by in its template."""

    NONE = "none"
    SCORE = "score"
    NORM = "norm"


@app.command()
def templates(
    gallery: GalleryPath,
    meta: Annotated[
        str, typer.Argument(metavar="META", help="Folder of the protocol, such as IJBC/meta.", show_default=False)
    ],
    weight: Annotated[
        TemplateWeight,
        typer.Option(help="Weight of an image: the protocol's detector score, or the length of the network's vector."),
    ] = TemplateWeight.NONE,
    as_json: Json = False,
) -> None:
    """Measure templates by the protocols of IJB-B and IJB-C.

    To take the landmarks of the protocol, embed the images with `--boxes META/ijbc_name_5pts_score.txt`.

    A template is a set of images of one person. Figures are TAR at fixed FAR over pairs of templates (1:1), and ranks
    and TPIR at fixed FPIR per gallery (1:N). META holds the files of insightface's test suite: *_face_tid_mid.txt,
    *_template_pair_label.txt, *_1N_gallery_G1.csv, *_1N_gallery_G2.csv, *_1N_probe_mixed.csv, *_name_5pts_score.txt.

    For example:

        facepipe evaluate templates gallery/ IJBC/meta
    """
    with exit_on_error():
        from facepipe.evaluation.templates import evaluate_templates
        from facepipe.gallery import Gallery

        result = evaluate_templates(Gallery(gallery), meta, weight.value)
        print_result(result.to_dict(), as_json=as_json, print_text=lambda: _print_templates(meta, result))


def _print_templates(meta: str, result: Any) -> None:
    rows = [("images, without a face", f"{result.images}, {result.without_face}"), ("templates", result.templates)]
    if result.verification is not None:
        verification = result.verification
        rows.append(("pairs, of one person", f"{verification.pairs}, {verification.genuine}"))
        rows.append(("AUC", f"{verification.auc:.5f}"))
        for far, tar in verification.tar.items():
            rows.append((f"TAR at FAR {far}", _format_share(tar, "too few impostor pairs")))
    for number, search in enumerate(result.searches, 1):
        rows.append((f"gallery {number}: enrolled", search.enrolled))
        rows.append(("  probes of enrolled, of others", f"{search.mated}, {search.others}"))
        rows.append(("  rank 1, 5, 10", ", ".join(f"{share:.4f}" for share in search.ranks.values())))
        for fpir, tpir in search.tpir.items():
            rows.append((f"  TPIR at FPIR {fpir}", _format_share(tpir, "too few probes of others")))
    for fpir, tpir in result.tpir.items():
        rows.append((f"TPIR at FPIR {fpir}, mean of galleries", _format_share(tpir, "too few probes of others")))
    print_table(f"templates of {meta}", ("", ""), rows)


@app.command()
def index(
    gallery: GalleryPath,
    queries: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Number of the gallery's faces to search for.", show_default="by its size"),
    ] = None,
    recall: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, max=1, help="Recall to choose the settings for.", show_default="the index's"),
    ] = None,
    k: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option("-k", "--k", min=1, help="Neighbours to measure; repeatable.", show_default="1, 10, 100, 1000"),
    ] = None,
    radius: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(min=0, max=2, help="Distance to measure; repeatable.", show_default="some by the faces"),
    ] = None,
    picture: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="RECALL.png", help="Picture of recall against lists visited.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the search index.

    Figures are recall against exact search for several numbers of neighbours and radii, queries per second, and bytes
    per vector. Identification is measured if the gallery has labels.

    For example:

        facepipe evaluate index gallery/ --picture recall.png

        facepipe evaluate index gallery/ -k 50 --radius 0.4
    """
    with exit_on_error():
        from facepipe.evaluation.index import evaluate_index
        from facepipe.gallery import Gallery

        result = evaluate_index(Gallery(gallery), queries, recall, picture, ks=k, radii=radius)
        print_result(result.to_dict(), as_json=as_json, print_text=lambda: _print_index(gallery, result))


def _print_index(gallery: str, result: Any) -> None:
    # Size, recall and speed of the index.
    rows = [
        ("faces, shards, deleted in them", f"{result.faces}, {result.shards}, {result.dead}"),
        ("factory", result.factory),
        ("lists visited, candidates re-scored", f"{result.nprobe}, {result.rescore}"),
        (f"recall@1, {result.queries} queries", f"{result.recall_at_1:.4f}"),
        (f"recall@10 (requested {result.asked:g})", f"{result.recall_at_10:.4f} ± {result.standard_error:.4f}"),
        ("queries/s in a batch", f"{result.qps:.0f}"),
        ("queries/s against every vector", f"{result.exact_qps:.0f}"),
        ("one query alone", f"{result.single_ms:.2f} ms"),
        ("bytes per vector: index, side files", f"{result.bytes_per_vector:.1f}, {result.side_bytes_per_vector:.1f}"),
        ("imbalance of the lists", f"{result.imbalance:.3f}"),
    ]

    # Identification of labelled faces.
    identification = result.identification
    if identification is not None:
        rate = f"{identification.rank_1:.4f} of {identification.mated} mated searches"
        rows.append(("rank-1 identification", rate))
        for point in identification.points:
            missed = "no mated searches" if point.fnir is None else f"{point.fnir:.4f}"
            rows.append((f"FNIR at FPIR {point.fpir:g}", f"{missed} (distance <= {point.threshold:.4f})"))
    print_table(f"index of {gallery}", ("", ""), rows)

    # Recall of what may be asked for.
    asked = [
        (
            f"{one.k} nearest" if one.k is not None else f"within {one.radius:g}",
            f"{one.nprobe}, {one.rescore}",
            "nobody is so near" if one.recall is None else f"{one.recall:.4f} ± {one.standard_error:.4f}",
            "not measured" if one.stated is None else f"{one.stated:.4f}",
            f"{one.qps:.0f}",
        )
        for one in result.asked_for
    ]
    print_table("searches", ("asked for", "lists, re-scored", "recall", "stated", "queries/s"), asked)

    # Recall by search effort.
    points = [(p.nprobe, p.rescore, f"{p.recall_at_1:.4f}", f"{p.recall_at_10:.4f}") for p in result.curve]
    print_table("measured, lower bounds of 95 %", ("lists", "re-scored", "recall@1", "recall@10"), points)
    for note in result.notes:
        print(note)


@app.command()
def clusters(
    gallery: GalleryPath,
    file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--table",
            metavar="FACES.parquet",
            help="Clusters, as face_id and cluster.",
            show_default="those of facepipe cluster",
        ),
    ] = None,
    truth: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TRUTH", help=f"{_TRUTH}.", show_default="the gallery's own labels"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure clusters against identities.

    Figures are precision, recall and F over pairs and by BCubed, NMI, and sizes. Only the largest face of a photo
    counts, unless the truth names faces by face_id.

    For example:

        facepipe evaluate clusters gallery/ --truth people.csv
    """
    with exit_on_error():
        from facepipe.decisions.gallery import DecidedGallery
        from facepipe.evaluation.clusters import evaluate_clusters

        result = evaluate_clusters(DecidedGallery(gallery), file, truth)
        print_result(result.to_dict(), as_json=as_json, print_text=lambda: _print_clusters(gallery, result))


def _print_clusters(gallery: str, result: Any) -> None:
    scores = result.scores
    rows = [
        ("faces, identities", f"{scores.faces}, {scores.identities}"),
        ("clusters, of one face", f"{scores.clusters}, {scores.singletons}"),
        ("faces of the largest cluster", scores.largest),
        ("pairs: precision, recall, F", _format_rates(scores.pairwise)),
        ("BCubed: precision, recall, F", _format_rates(scores.bcubed)),
        ("NMI", f"{scores.nmi:.4f}"),
        ("left out: smaller faces of a photo", result.left_out),
        ("left out: labelled, but in no cluster", result.without_cluster),
        ("left out: in a cluster, but without a label", result.without_label),
    ]
    print_table(f"clusters of {gallery}", ("", ""), rows)


@app.command()
def clean(
    gallery: GalleryPath,
    truth: Annotated[
        str,
        typer.Argument(
            metavar="TRUTH",
            help=f"{_TRUTH}; an empty identity means that the person is not in the set.",
            show_default=False,
        ),
    ],
    file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--table",
            metavar="DECISIONS.parquet",
            help="Decisions, as face_id, identity, decision, suggested, noise.",
            show_default="those of facepipe clean",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure decisions on labels against the truth.

    Figures are wrong labels detected and repaired, and the calibration of `noise`: expected and actual errors, and a
    curve of wrong labels by probability. A label counts as detected if it is decided outlier, relabel or bystander, or
    review with a noise above 0.5. If the truth names photos by uri, only the largest
    face of each counts.

    For example:

        facepipe evaluate clean gallery/ truth.csv
    """
    with exit_on_error():
        from facepipe.decisions.gallery import DecidedGallery
        from facepipe.evaluation.cleaning import evaluate_clean

        result = evaluate_clean(DecidedGallery(gallery), truth, file)
        print_result(result.to_dict(), as_json=as_json, print_text=lambda: _print_clean(gallery, result))


def _print_clean(gallery: str, result: Any) -> None:
    rows = [
        ("faces, wrong labels, detected", f"{result.faces}, {result.wrong}, {result.flagged}"),
        ("detection: precision, recall, F", _format_rates(result.detection)),
        ("average precision by noise", _format_share(result.average_precision, "no wrong label")),
        ("wrong labels relabelled correctly", _format_share(result.repaired, "no wrong label")),
        ("relabels that are correct", _format_share(result.relabels_right, "no relabel")),
        ("wrong decisions: expected, actual", f"{result.expected_errors:.1f}, {result.errors}"),
        ("left out: smaller faces of a photo", result.left_out),
        ("left out: decided, but not in the truth", result.without_truth),
        ("left out: decided, but without a label", result.without_label),
        ("left out: in the truth, but not decided", result.without_decision),
    ]
    print_table(f"labels of {gallery}", ("", ""), rows)
    # A second table shows which decisions were taken on correct and on wrong labels.
    counts = [(decision, count["right"], count["wrong"]) for decision, count in result.counts.items()]
    print_table("labels by decision", ("decision", "right", "wrong"), counts)
    # A third one shows whether the stated probabilities hold.
    curve = [
        (f"{entry.low:g} to {entry.high:g}", entry.labels, f"{entry.expected:.1f}", entry.wrong)
        for entry in result.reliability
    ]
    print_table(
        "labels by the probability that they are wrong", ("probability", "labels", "wrong, expected", "wrong"), curve
    )


def _format_rates(rates: Any) -> str:
    return f"{rates.precision:.4f}, {rates.recall:.4f}, {rates.f:.4f}"


def _format_share(share: float | None, when_none: str) -> str:
    return when_none if share is None else f"{share:.4f}"
