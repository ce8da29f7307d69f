"""facepipe models: what there is, trying it out, writing it as ONNX, bringing it to 128 dimensions"""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from jobs.console import emit, failures, say, table
from jobs.options import GalleryPath, Json

app = typer.Typer()
_COLUMNS = ("name", "role", "summary", "weights", "licence", "input", "sha256")
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A registered name, a model's TOML file, or its name in FACEPIPE_MODELS.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="List the networks that a TOML file may name instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the models: where their weights come from, under which licence, what they take.

    Those of TOML files in the folder that the environment variable FACEPIPE_MODELS names are listed too.

    Example:

        facepipe models

        facepipe models --architectures
    """
    if context.invoked_subcommand is not None:
        return
    with failures():
        if architectures:
            _architectures(as_json)
        else:
            _list(as_json)


def _list(as_json: bool) -> None:
    from facepipe.models.zoo.check import listed

    rows = []
    for found, name, problem in listed():
        known = {column: getattr(found, column) for column in _COLUMNS} if found else dict.fromkeys(_COLUMNS, "")
        rows.append(known if found else {**known, "name": name, "summary": f"cannot be used: {problem}"})
    columns = ("name", "role", "summary", "licence")
    shown = [[row[column] for column in columns] for row in rows]
    emit(
        {"models": rows}, as_json, lambda: table("models (--json: weights, SHA-256 and input as well)", columns, shown)
    )


def _architectures(as_json: bool) -> None:
    from facepipe.models.zoo.architectures import ARCHITECTURES
    from facepipe.models.zoo.check import described

    columns = ("name", "role", "summary", "input", "alignment", "lineages")
    rows = []
    for made in ARCHITECTURES.values():
        fed = made.input
        taken = f"{fed.channels.upper()}, mean {_numbers(fed.mean)}, scale {_numbers(fed.scale)}"
        alignment = described(made.layout) if made.role == "embedder" else ""
        lineages = ", ".join(lineage.name for lineage in made.lineages)
        rows.append(dict(zip(columns, (made.name, made.role, made.summary, taken, alignment, lineages), strict=True)))
    few = ("name", "role", "summary", "lineages")
    shown = [[row[column] for column in few] for row in rows]
    emit({"architectures": rows}, as_json, lambda: table("architectures (--json: input and alignment)", few, shown))


def _numbers(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(set(values)) == 1 else ", ".join(f"{v:g}" for v in values)


@app.command()
def check(model: Model, as_json: Json = False) -> None:
    """Load a model as a worker would, run it once, and say what it is.

    Example:

        facepipe models check arcface.toml
    """
    with failures():
        from facepipe.models.zoo.check import check as examine

        found = examine(model)
        rows = [(name, value) for name, value in asdict(found).items() if value not in ("", None)]
        emit(asdict(found), as_json, lambda: table(f"model {model}", ("", ""), rows))


@app.command()
def export(
    model: Model,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT.onnx", help="The graph; a TOML file of the same name is written beside it.", show_default=False
        ),
    ],
    opset: Annotated[int | None, typer.Option(min=18, help="Of the ONNX operators.", show_default="20")] = None,
    as_json: Json = False,
) -> None:
    """Write an embedder as one ONNX graph that takes chips as they are cut: uint8, RGB, (n, height, width, 3).

    Channel order, mean, scale and projection are inside; batch norms are folded where torch can. Nothing is written
    unless ONNX Runtime gives the vectors that torch gives.

    Example:

        facepipe models export arcface.toml arcface-onnx.onnx
    """
    with failures("nothing was written"):
        from pathlib import Path

        from facepipe.models.zoo.export import OPSET
        from facepipe.models.zoo.export import export as write

        made = write(model, Path(out), opset or OPSET)
        emit(asdict(made), as_json, lambda: table(f"export of {model}", ("", ""), asdict(made).items()))


@app.command()
def project(
    card: Annotated[
        str,
        typer.Argument(
            metavar="CARD.toml", help="TOML file of a model with more than 128 dimensions.", show_default=False
        ),
    ],
    gallery: GalleryPath,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="PAIRS", help="LFW's pairs.txt or a CSV, to measure the loss on.", show_default="drawn"),
    ] = None,
    faces: Annotated[int | None, typer.Option(min=1, help="Of the gallery, to fit on.", show_default="20000")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of faces and pairs.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Fit the matrix that brings a model's vectors to the 128 dimensions of a gallery, and say what that loses.

    The gallery may be of any models: its images are read again, its boxes and landmarks are used, no detector is run.
    Writes CARD.projection.safetensors and CARD-128.toml, which is the model to embed with.

    Example:

        facepipe models project arcface.toml gallery/ --pairs pairs.txt

        facepipe embed photos/ arcface-gallery/ --embedder arcface-128.toml
    """
    with failures("nothing was written"):
        from facepipe.config import build
        from jobs.options import given
        from pipelines.project import ProjectConfig, run

        config = build(ProjectConfig, given(pairs=pairs, faces=faces, seed=seed))
        summary = run(config, card, gallery, say("project", quiet))
        emit(asdict(summary), as_json, lambda: _show(summary))


def _show(summary: Any) -> None:
    rows = [("faces fitted on", summary.faces)]
    rows += [(f"images: {status}", count) for status, count in sorted(summary.images.items())]
    rows += [("kept by 128 dimensions", f"{summary.energy:.2%} of the squared length"), ("model", summary.card)]
    table(f"projection of {summary.dim} dimensions to 128 -> {summary.projection}", ("", ""), rows)
    if summary.full is None or summary.reduced is None:
        print(f"The loss was not measured: {summary.unmeasured}")
        return
    measured = ((f"{summary.dim} dimensions", summary.full), ("128 dimensions", summary.reduced))
    lines = [
        (name, f"{found.accuracy:.4f}", "too few pairs" if found.tar is None else f"{found.tar:.4f}")
        for name, found in measured
    ]
    title = f"{summary.full.same} pairs of one person, {summary.full.different} of two"
    table(title, ("", "accuracy", "TAR at FAR 1e-3"), lines)
    if summary.measured_on_fit:
        print(
            "The gallery has too few other faces: these were fitted on too, so that the real loss is a little larger."
        )
