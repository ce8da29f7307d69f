"""The command `facepipe models`, with `check`, `export`, `project` and `measure`."""

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from jobs.console import exit_on_error, print_result, print_table
from jobs.options import GalleryPath, Json, Quiet, select_set
from jobs.progress import ProgressReporter

app = typer.Typer()
_COLUMNS = ("name", "role", "summary", "weights", "licence", "input", "sha256")
_ARCHITECTURE_COLUMNS = ("name", "role", "summary", "input", "alignment", "lineages")
_UNCHANGED_HINT = "nothing was written"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Registered name, TOML file of a model, or its name in FACEPIPE_MODELS.",
        show_default=False,
    ),
]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="List of the networks that a model's TOML file may name.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List, check, export, project or measure models.

    The list says where the weights of each model come from, under which licence, and what the model takes. It includes
    models with a TOML file in the folder FACEPIPE_MODELS, and models that are known and whose files are not here.

    For example:

        facepipe models

        facepipe models --architectures
    """
    # This also runs before each subcommand, which then does the work alone.
    if context.invoked_subcommand is not None:
        return
    with exit_on_error():
        if architectures:
            _list_architectures(as_json=as_json)
        else:
            _list_models(as_json=as_json)


def _list_models(*, as_json: bool) -> None:
    from facepipe.models.zoo.check import list_models
    from facepipe.models.zoo.known import describe_file, find_provenance

    rows = []
    for model in list_models():
        # A broken file is listed with its error, so that one file does not hide the others.
        provenance = find_provenance(model.name)
        origin = {
            "file": "here" if model.card else "damaged",
            "code_licence": provenance.code_licence if provenance else "",
            "data": provenance.data if provenance else "",
        }
        if model.card:
            rows.append({column: getattr(model.card, column) for column in _COLUMNS} | origin)
        elif model.known:
            card = model.known.card
            values = {
                "name": card.name,
                "role": card.role,
                "summary": model.known.summary,
                "weights": describe_file(model.known),
                "licence": card.licence,
                "input": "",
                "sha256": card.sha256,
            }
            rows.append(values | origin | {"file": "to get"})
        else:
            problem = f"cannot be used: {model.error}"
            rows.append({**dict.fromkeys(_COLUMNS, ""), "name": model.name, "summary": problem} | origin)
    _print_rows(
        "models",
        rows,
        title="models (--json: where their files are, SHA-256 and input as well)",
        columns=("name", "role", "summary", "file", "licence", "data"),
        as_json=as_json,
    )


def _list_architectures(*, as_json: bool) -> None:
    from facepipe.models.zoo.architectures import ARCHITECTURES
    from facepipe.models.zoo.check import describe_layout

    rows = []
    for architecture in ARCHITECTURES.values():
        taken = architecture.input
        mean = _format_numbers(taken.mean)
        scale = _format_numbers(taken.scale)
        values = (
            architecture.name,
            architecture.role,
            architecture.summary,
            f"{taken.channels.upper()}, mean {mean}, scale {scale}",
            describe_layout(architecture.layout) if architecture.role == "embedder" else "",
            ", ".join(lineage.name for lineage in architecture.lineages),
        )
        rows.append(dict(zip(_ARCHITECTURE_COLUMNS, values, strict=True)))
    _print_rows(
        "architectures",
        rows,
        title="architectures (--json: input and alignment as well)",
        columns=("name", "role", "summary", "lineages"),
        as_json=as_json,
    )


def _print_rows(key: str, rows: list[dict[str, Any]], *, title: str, columns: tuple[str, ...], as_json: bool) -> None:
    """Print rows with all their columns as JSON, or with a few of them as a table.

    Args:
        key: name of the list in the JSON object.
        rows: the rows.
        title: title of the table.
        columns: columns of the table.
        as_json: whether `--json` is set.
    """
    print_result(
        {key: rows},
        as_json=as_json,
        print_text=lambda: print_table(title, columns, [[row[column] for column in columns] for row in rows]),
    )


def _format_numbers(values: tuple[float, ...]) -> str:
    """Format one number per channel, or a single number if all are equal."""
    return f"{values[0]:g}" if len(set(values)) == 1 else ", ".join(f"{value:g}" for value in values)


@app.command()
def add(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Weights of a known model, as published.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Add the file of a known model, so that it is found by name.

    The file is recognised by its SHA-256, whatever it is called, and copied into the folder that FACEPIPE_MODELS names,
    by default ~/.local/share/facepipe/models. An altered file is refused. Then the model is loaded and run once.

    For example:

        facepipe models add face_recognition_sface_2021dec.onnx
    """
    with exit_on_error():
        from pathlib import Path

        from facepipe.models.zoo.check import check_model
        from facepipe.models.zoo.install import add_model, require_golden

        added = add_model(Path(file))
        checked = check_model(added.model.name)
        if checked.role == "embedder" and not added.model.needs_projection:
            require_golden(added.model.name)
        rows = [
            ("role", checked.role),
            ("file", str(added.card_path)),
            ("licence of the weights", added.model.card.licence),
            ("licence of the code", added.model.code_licence),
            ("training data", added.model.data),
            ("milliseconds", checked.milliseconds),
        ]
        if checked.note:
            rows.append(("note", checked.note))
        result = {name.replace(" ", "_"): value for name, value in rows} | {"name": added.model.name}
        print_result(
            result, as_json=as_json, print_text=lambda: print_table(f"added {added.model.name}", ("", ""), rows)
        )


@app.command()
def check(model: Model, as_json: Json = False) -> None:
    """Load a model, run it once, and describe it.

    For example:

        facepipe models check arcface.toml
    """
    with exit_on_error():
        from facepipe.models.zoo.check import check_model
        from facepipe.models.zoo.install import has_golden, require_golden

        # The table leaves out empty values; the JSON has all.
        description = asdict(check_model(model))
        if has_golden(model):
            require_golden(model)
        rows = [(name, value) for name, value in description.items() if value not in ("", None)]
        print_result(description, as_json=as_json, print_text=lambda: print_table(f"model {model}", ("", ""), rows))


@app.command()
def export(
    model: Model,
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT.onnx",
            help="File for the ONNX graph; a TOML file of the same name is written beside it.",
            show_default=False,
        ),
    ],
    opset: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=18, help="ONNX opset version.", show_default="20"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write an embedder as one ONNX graph.

    The graph takes chips as they are cut: uint8, RGB, (n, height, width, 3). It contains channel order, mean, scale and
    projection; batch norms are folded if torch can fold them. Nothing is written unless ONNX Runtime returns the same
    vectors as torch.

    For example:

        facepipe models export arcface.toml arcface-onnx.onnx
    """
    with exit_on_error(_UNCHANGED_HINT):
        from pathlib import Path

        from facepipe.models.zoo.export import OPSET, export_model

        description = asdict(export_model(model, Path(out), opset or OPSET))
        print_result(
            description,
            as_json=as_json,
            print_text=lambda: print_table(f"export of {model}", ("", ""), description.items()),
        )


@app.command()
def project(
    card: Annotated[
        str,
        typer.Argument(metavar="CARD.toml", help="TOML file of a model of more dimensions.", show_default=False),
    ],
    gallery: GalleryPath,
    pairs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="PAIRS", help="LFW's pairs.txt or a CSV, to measure the loss on.", show_default="random pairs"
        ),
    ] = None,
    dim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=64, max=1024, help="Number of dimensions to reduce to.", show_default="128"),
    ] = None,
    faces: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Number of faces to fit on.", show_default="20000"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fit a projection of a model to fewer dimensions.

    The matrix reduces the model's vectors to 128 numbers, or as many as --dim says; its loss is measured. A gallery
    takes the longer vectors as well, but needs more memory and time. GALLERY may be of any models. Its images are read
    again, and its boxes and landmarks are used; no detector is run. Writes CARD.projection.safetensors and
    CARD-128.toml, which is the model to embed with.

    For example:

        facepipe models project arcface.toml gallery/ --pairs pairs.txt

        facepipe embed photos/ arcface-gallery/ --embedder arcface-128.toml
    """
    with exit_on_error(_UNCHANGED_HINT):
        from facepipe.config import build
        from pipelines.project import ProjectConfig, run

        # There is no config file here: the options are the whole config.
        config = build(ProjectConfig, select_set(pairs=pairs, dim=dim, faces=faces, seed=seed))
        with ProgressReporter("project", quiet=quiet) as progress:
            summary = run(config, card, gallery, progress.update)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_projection(summary))


def _print_projection(summary: Any) -> None:
    rows = [("faces fitted on", summary.faces)]
    rows += [(f"images: {status}", count) for status, count in sorted(summary.images.items())]
    rows.append((f"kept by {summary.reduced_dim} dimensions", f"{summary.energy:.2%} of the squared length"))
    rows.append(("model", summary.card))
    title = f"projection of {summary.dim} dimensions to {summary.reduced_dim} -> {summary.projection}"
    print_table(title, ("", ""), rows)

    # What the projection loses, on pairs of faces.
    if summary.full is None or summary.reduced is None:
        print(f"The loss was not measured: {summary.unmeasured}")
        return
    scores = []
    for dimensions, verification in ((summary.dim, summary.full), (summary.reduced_dim, summary.reduced)):
        tar = "too few pairs" if verification.tar is None else f"{verification.tar:.4f}"
        scores.append((f"{dimensions} dimensions", f"{verification.accuracy:.4f}", tar))
    title = f"{summary.full.same} pairs of one person, {summary.full.different} of two"
    print_table(title, ("", "accuracy", "TAR at FAR 1e-3"), scores)
    if summary.measured_on_fit:
        print("The actual loss is slightly larger: some of these faces were also fitted on, for lack of others.")


@app.command()
def measure(
    card: Annotated[
        str,
        typer.Argument(metavar="CARD.toml", help="TOML file of an embedder.", show_default=False),
    ],
    gallery: GalleryPath,
    faces: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=200, help="Number of faces to measure on.", show_default="1000"),
    ] = None,
    no_labels: Annotated[
        bool, typer.Option("--no-labels", help="Labels of the gallery are not used: for noisy or few ones.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure what a model's distances mean.

    The distance up to which two faces are one person's comes from labelled pairs, or without labels from strangers
    alone. The limits of copies come from altered copies of faces. The gallery may be of any models; its images are read
    again, and no detector is run. The figures are written into CARD.toml, so that thresholds and `dedup` fit the model.

    For example:

        facepipe models measure arcface-128.toml gallery/
    """
    with exit_on_error(_UNCHANGED_HINT):
        from facepipe.config import build
        from pipelines.measure import MeasureConfig, run

        # There is no config file here: the options are the whole config.
        config = build(MeasureConfig, select_set(faces=faces, labels=False if no_labels else None, seed=seed))
        with ProgressReporter("measure", quiet=quiet) as progress:
            summary = run(config, card, gallery, progress.update)
        print_result(asdict(summary), as_json=as_json, print_text=lambda: _print_measurement(summary))


def _print_measurement(summary: Any) -> None:
    same = summary.same_person
    copies = summary.copies
    if same.basis == "labels":
        basis = f"{same.same} pairs of one person by the labels; 90 % of resamples lie between"
    else:
        basis = "strangers only: no labels, or too few. Where 0.1 and 1 % of strangers are nearer"
    rows = [("faces", summary.faces)]
    rows += [(f"images: {status}", count) for status, count in sorted(summary.images.items())]
    rows += [
        ("same_person", f"{same.distance:.3f}"),
        ("its range", f"{same.low:.3f} to {same.high:.3f}"),
        ("from", basis),
        ("copies, cut or recoloured, within", f"{copies.near:.3f}"),
        ("copies, shrunk or compressed, within", f"{copies.close_near:.3f}"),
        ("photos of one moment, within", f"{copies.same_shot:.3f}"),
        ("model", summary.card),
    ]
    print_table("distances of the model", ("", ""), rows)
