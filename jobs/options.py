"""Options that several commands share, and the config that they add up to."""

import os
import sys
from typing import Annotated, Any, Literal, Optional, TypeVar

import typer

from facepipe.config import build, parse_settings, read_toml, resolve_paths
from jobs.examples import write_example
from jobs.settings import print_settings

Config = TypeVar("Config")

# Keys of paths in the configs of jobs.
_JOB_PATHS = (
    "gallery",
    "source.uri",
    "source.root",
    "source.boxes",
    "dataset.against",
    "queries",
    "output",
    "embed.source.root",
)
_MODEL_PATHS = ("detect.model", "embed.model", "embed.detect.model", "embed.embed.model")

# Choices of options. The configs have the same ones, but are imported only when a command runs; a test compares them.
LogFormat = Literal["text", "json"]
IdentityRule = Literal["auto", "folder", "filename", "label", "none"]
Runner = Literal["auto", "inline", "local", "ray"]
Keep = Literal["largest", "sharpest", "oldest"]
Drop = Literal["exact", "near", "same_shot"]
Decide = Literal["nearest", "vote"]
NameRole = Literal["auto", "people", "images"]

GalleryPath = Annotated[str, typer.Argument(metavar="GALLERY", help="Folder of the gallery.", show_default=False)]
ConfigFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--config", metavar="FILE.toml", help="TOML file with one section per stage.", show_default=False),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Single setting, which overrides --config; repeatable.",
        show_default=False,
    ),
]
JobSettings = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Single setting, which overrides the TOML file; repeatable.",
        show_default=False,
    ),
]
HelpSettings = Annotated[
    bool,
    typer.Option(
        "--help-settings",
        help="List of all settings for --config and --set, with defaults and meanings.",
        callback=print_settings,
        is_eager=True,
    ),
]
Init = Annotated[
    bool,
    typer.Option("--init", help="Commented example config, as a new file here.", callback=write_example, is_eager=True),
]
Check = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Only a check of models, gallery, sources, credentials, disk and memory; nothing is embedded or left.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")]
YesErase = Annotated[
    Optional[list[int]],  # noqa: UP045
    typer.Option(
        "--yes-erase", metavar="N", help="Number of images to erase, if they are more than may go without asking."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only a count of what would be done; nothing is written.")]
Detector = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--detector", metavar="MODEL", help="Name of a registered detector, or a model's TOML file.", show_default=False
    ),
]
Embedder = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--embedder", metavar="MODEL", help="Name of a registered embedder, or a model's TOML file.", show_default=False
    ),
]
Where = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="FILTER", help="Filter on rows, such as \"status = 'ok' and det_score > 0.9\".", show_default=False
    ),
]


def select_set(**options: Any) -> dict[str, Any]:
    """Return the options that the user set, which are those that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def build_config(
    kind: type[Config], config_file: str | None, settings: list[str] | None, options: dict[str, Any] | None = None
) -> Config:
    """Build a command's config. Options override the file, and `--set` overrides both.

    Args:
        kind: dataclass of the config.
        config_file: path of `--config`, if set.
        settings: values of `--set`, if set.
        options: the other options, as sections and keys of the config.

    Raises:
        ConfigError: if the file is not TOML, a key is unknown, or a value is invalid.
    """
    file_layer = read_toml(config_file) if config_file else {}
    return build(kind, file_layer, options or {}, parse_settings(settings or []))


def build_job_config(kind: type[Config], config_file: str, settings: list[str] | None) -> Config:
    """Build the config of a job that runs from one TOML file. Paths in the file are relative to its folder.

    Args:
        kind: dataclass of the config.
        config_file: path of the file.
        settings: values of `--set`, if set. Paths in them are relative to the working folder.

    Raises:
        ConfigError: if the file is not TOML, a key is unknown, or a value is invalid.
    """
    tree = read_toml(config_file)
    folder = os.path.dirname(config_file)
    notes = resolve_paths(tree, folder, _JOB_PATHS)
    # A model is a registered name, or the path of its file.
    notes += resolve_paths(tree, folder, _MODEL_PATHS, is_path=lambda value: value.endswith((".toml", ".safetensors")))
    for note in notes:
        print(f"facepipe: {note}", file=sys.stderr)
    return build(kind, tree, parse_settings(settings or []))


def build_model_sections(detector: str | None, embedder: str | None) -> dict[str, Any]:
    """Return `--detector` and `--embedder` as sections of an `embed` config."""
    sections = {"detect": select_set(model=detector), "embed": select_set(model=embedder)}
    return {section: values for section, values in sections.items() if values}
