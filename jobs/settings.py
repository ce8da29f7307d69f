"""What `--help-settings` prints: every setting of a command, with its default, type and meaning."""

import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from jobs.console import exit_on_error

# Characters per line of the help.
_WIDTH = 100

# The config classes of each command, imported only when they are needed.
CONFIG_CLASSES = {
    "embed": ("pipelines.embed:EmbedConfig",),
    "index": ("pipelines.index:IndexConfig",),
    "search": ("pipelines.search:SearchConfig",),
    "identify": ("pipelines.identify:IdentifyConfig",),
    "dedup": ("pipelines.dedup:DedupConfig",),
    "cluster": ("pipelines.cluster:ClusterConfig",),
    "clean": ("pipelines.clean:CleanConfig",),
    "finish": ("pipelines.finish:FinishConfig",),
    "train": ("pipelines.train:TrainConfig", "pipelines.train:DetectorConfig"),
    "compact": ("pipelines.compact:CompactRunConfig",),
    "nightly": ("pipelines.nightly.config:NightlyConfig",),
    "clean-dataset": ("pipelines.clean_dataset:CleanDatasetConfig",),
    "bulk-search": ("pipelines.bulk_search:BulkSearchConfig",),
}
# Settings with one value left, which old config files may still hold.
HIDDEN_SETTINGS = frozenset({"cluster.algorithm", "run.resident"})
_TITLES = {"DetectorConfig": "To train a detector:"}
# Names that annotations give to limits of numbers, and their signs.
_LIMIT_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
# A line of an `Attributes:` block: name, type in brackets if any, meaning.
_ATTRIBUTE = re.compile(r"    (\w+)(?: \([^)]*\))?: (.+)")


@dataclass(frozen=True)
class SettingHelp:
    """A setting of a command.

    Attributes:
        name: section and key, such as `detect.size`.
        default: its default, as TOML writes it, or "not set".
        type: what it may be, such as `integer` or `auto | local | ray`.
        meaning: what it does.
    """

    name: str
    default: str
    type: str
    meaning: str


@dataclass(frozen=True)
class SectionHelp:
    """A section of a command's config.

    Attributes:
        name: its name in the TOML file, empty for the keys above the first section.
        is_list: whether the file may hold several of it, as `[[source]]`.
        meaning: what its settings have in common.
        settings: its settings.
    """

    name: str
    is_list: bool
    meaning: str
    settings: list[SettingHelp]


def print_settings(context: typer.Context, value: bool) -> None:
    """Print the settings of the command that `--help-settings` was given to, and exit."""
    # Parsing is resilient if a shell asks for completions: then nothing may be printed.
    if not value or context.resilient_parsing:
        return
    name = context.info_name or ""
    with exit_on_error():
        configs = load_config_classes(name)
    print(f"Settings of `facepipe {name}`, for --config FILE.toml and --set SECTION.KEY=VALUE:\n")
    for config in configs:
        if config.__name__ in _TITLES:
            print(f"{_TITLES[config.__name__]}\n")
        for section in list_sections(config):
            print(format_section(section))
    raise typer.Exit


def load_config_classes(command: str) -> list[type]:
    """Import the config classes of a command.

    Args:
        command: name of the command, such as `clean-dataset`.
    """
    classes = []
    for path in CONFIG_CLASSES[command]:
        module, _, name = path.partition(":")
        classes.append(getattr(importlib.import_module(module), name))
    return classes


def list_sections(config: type, prefix: str = "") -> Iterator[SectionHelp]:
    """Yield the sections of a config class, with the keys that belong to no section first.

    Args:
        config: dataclass of the config.
        prefix: name of the section, with a dot at its end; empty for a whole config.
    """
    # First the plain settings of this level, as one section.
    hints = get_type_hints(config, include_extras=True)
    meanings = read_meanings(config)
    settings = []
    for key in fields(config):
        name = f"{prefix}{key.name}"
        if _get_section_class(hints[key.name]) is None and name not in HIDDEN_SETTINGS:
            settings.append(
                SettingHelp(name, _format_default(key), describe_type(hints[key.name]), meanings.get(key.name, ""))
            )
    if settings:
        yield SectionHelp(prefix.rstrip("."), False, _read_summary(config) if prefix else "", settings)
    # Then the sections in it; everything inside a list of sections counts as a list too.
    for key in fields(config):
        section_class = _get_section_class(hints[key.name])
        if section_class is not None:
            is_list = get_origin(hints[key.name]) is tuple
            for section in list_sections(section_class, f"{prefix}{key.name}."):
                yield replace(section, is_list=is_list or section.is_list)


def _get_section_class(hint: Any) -> Any:
    """Return the dataclass of a section, or of the items of a list of sections; None for a plain value."""
    if is_dataclass(hint):
        return hint
    arguments = get_args(hint)
    if get_origin(hint) is tuple and arguments and is_dataclass(arguments[0]):
        return arguments[0]
    return None


def read_meanings(config: type) -> dict[str, str]:
    """Read what each field means from the `Attributes:` block of a dataclass, and of its base classes."""
    meanings: dict[str, str] = {}
    # Base classes come first, so that a class can describe an inherited field anew.
    for base in reversed(config.__mro__):
        if not is_dataclass(base):
            continue
        _, _, block = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        name = ""
        # A deeper indented line continues the meaning above it; any other line ends it.
        for line in block.splitlines():
            if match := _ATTRIBUTE.fullmatch(line):
                name = match[1]
                meanings[name] = match[2]
            elif name and line.startswith("        "):
                meanings[name] += " " + line.strip()
            else:
                name = ""
    return meanings


def _read_summary(config: type) -> str:
    """Return the first paragraph of a class's docstring as one line."""
    return " ".join(inspect.cleandoc(config.__doc__ or "").split("\n\n")[0].split())


def _format_default(field: Field[Any]) -> str:
    """Format a default as TOML writes it."""
    # A field has a default, a factory of one, or neither.
    default = field.default
    if default is MISSING:
        default = field.default_factory() if field.default_factory is not MISSING else None
    if default is None:
        return "not set"
    # Booleans are integers too, so they are handled first.
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and abs(default) >= 10_000:
        return f"{default:_}"
    if isinstance(default, tuple | list):
        return f"[{', '.join(_format_value(item) for item in default)}]"
    return _format_value(default)


def _format_value(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def describe_type(hint: Any) -> str:
    """Describe what a setting may be: a type with its limits, or its choices.

    Args:
        hint: type annotation of the field, with `Annotated`.
    """
    # Unwrap limits, choices, unions and lists in turn; what is left is a plain type.
    origin = get_origin(hint)
    if origin is Annotated:
        kind, *notes = get_args(hint)
        limits = _describe_limits(notes)
        return f"{describe_type(kind)} {limits}".rstrip()
    if origin is Literal:
        return " | ".join(str(choice) for choice in get_args(hint))
    if origin in (Union, types.UnionType):
        return " | ".join(describe_type(part) for part in get_args(hint) if part is not type(None))
    if origin in (tuple, list):
        return f"list of {describe_type(get_args(hint)[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true | false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def _describe_limits(notes: list[Any]) -> str:
    """Describe the limits of a number, such as `>= 0 and <= 1`."""
    limits = []
    for note in notes:
        # A limit is a note itself, or one of several in the metadata of a field.
        for part in getattr(note, "metadata", [note]):
            for name, sign in _LIMIT_SIGNS.items():
                limit = getattr(part, name, None)
                if limit is not None:
                    limits.append(f"{sign} {limit:g}")
    return " and ".join(limits)


def format_section(section: SectionHelp) -> str:
    """Format a section for a terminal: its name and meaning, then two lines or more per setting."""
    lines = []
    if section.name:
        lines.append(f"[[{section.name}]]" if section.is_list else f"[{section.name}]")
        lines += textwrap.wrap(section.meaning, _WIDTH)
    for setting in section.settings:
        lines.append(f"  {setting.name} = {setting.default}    ({setting.type})")
        lines += textwrap.wrap(setting.meaning, _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"
