"""Options that several commands share."""

from typing import Annotated, Any, Optional

import typer

GalleryPath = Annotated[str, typer.Argument(metavar="GALLERY", help="Folder of the gallery.", show_default=False)]
ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE.toml", help="Settings, one section a stage.", show_default=False),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="One setting; may be repeated, wins over --config.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Detector = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--detector", metavar="MODEL", help="A registered detector, or a model's TOML file.", show_default=False
    ),
]
Embedder = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--embedder", metavar="MODEL", help="A registered embedder, or a model's TOML file.", show_default=False
    ),
]
Where = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="FILTER", help="Rows to take, such as \"status = 'ok' and det_score > 0.9\".", show_default=False
    ),
]


def given(**options: Any) -> dict[str, Any]:
    """Those options that were given, as a layer of configuration."""
    return {name: value for name, value in options.items() if value is not None}


def models(detector: str | None, embedder: str | None) -> dict[str, Any]:
    """The options --detector and --embedder as settings of embed."""
    chosen = {"detect": given(model=detector), "embed": given(model=embedder)}
    return {section: values for section, values in chosen.items() if values}
