"""facepipe evaluate"""

from typing import Annotated, Any

import typer

from jobs.console import emit, failures, table
from jobs.options import GalleryPath, Json

app = typer.Typer(help="Measure a gallery against the truth.", no_args_is_help=True)


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
