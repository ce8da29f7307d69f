"""Writes docs/commands.md from the commands' own help: `python -m jobs.reference`."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import typer

from jobs.cli import app
from pipelines.clean import CleanConfig
from pipelines.cluster import ClusterConfig
from pipelines.compact import CompactRunConfig
from pipelines.dedup import DedupConfig
from pipelines.embed import EmbedConfig
from pipelines.index import IndexConfig
from pipelines.nightly.config import NightlyConfig, NightSource
from pipelines.search import SearchConfig
from pipelines.train import DetectorConfig, TrainConfig

_HEAD = """# Commands

Written by `python -m jobs.reference docs/commands.md` from the commands' help.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 failed; 2 wrong usage; 3 finished, but
above the error budget; 130 and 143 interrupted by Ctrl-C or SIGTERM with everything finished so far committed.
"""

_CONFIGS = (
    *(("embed", EmbedConfig), ("index", IndexConfig), ("search", SearchConfig)),
    *(("dedup", DedupConfig), ("cluster", ClusterConfig), ("clean", CleanConfig)),
    *(("train", TrainConfig), ("train (a detector)", DetectorConfig)),
    *(("compact", CompactRunConfig), ("nightly", NightlyConfig)),
)

_SETTINGS = """
## Settings

For `--config FILE.toml`, one section a heading, and for `--set section.key=value`, which wins. What follows comes from
the configuration classes, where the defaults live.
"""


def main(path: str) -> None:
    """Write the reference."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(_HEAD + "".join(section(name, command) for name, command in commands()) + settings())


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of every command, those of groups included."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        if not inner or command.invoke_without_command:
            yield name, command
        yield from ((f"{name} {sub}", c) for sub, c in (inner or {}).items())


def section(name: str, command: Any) -> str:
    """One command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["facepipe", name, *(p.metavar or p.name.upper() for p in arguments), "[OPTIONS]"])
    lines = [f"\n## facepipe {name}\n", f"    {usage}\n", inspect.cleandoc(command.help) + "\n"]
    lines += ["| argument or option | meaning |", "|---|---|"]
    for p in command.params:
        if getattr(p, "hidden", False):
            continue
        names = p.metavar or p.name.upper() if p.param_type_name == "argument" else ", ".join(f"`{o}`" for o in p.opts)
        lines.append(f"| {names} | {p.help or ''} |" if p.name != "help" else "")
    return "\n".join(line for line in lines if line) + "\n"


def settings() -> str:
    """Every key of the configurations, its default, and what its section's docstring says of it."""
    lines, shown = [_SETTINGS], dict[type, str]()
    for command, config in _CONFIGS:
        for part in fields(config):
            name, kind = part.name, type(getattr(config(), part.name))
            if kind is tuple:
                name, kind = f"[{part.name}]", NightSource
            if kind is EmbedConfig:
                lines += [f"\n### {command}: [{part.name}.…]\n", "All sections of embed, below this one.\n"]
            elif kind in shown:
                lines += [f"\n### {command}: [{name}]\n", f"As of {shown[kind]}.\n"]
            elif is_dataclass(kind):
                shown[kind] = f"{command}: [{name}]"
                lines += _section(shown[kind], part.name, kind)
    return "\n".join(lines) + "\n"


def _section(title: str, name: str, kind: type) -> list[str]:
    told = ["```", inspect.cleandoc(kind.__doc__ or ""), "```\n"]
    made: dict[str, Any] = {f.name: f.default_factory for f in fields(kind)}
    inner = {key: part for key, part in made.items() if isinstance(part, type) and is_dataclass(part)}
    keys = [f"| `{name}.{f.name}` | `{f.default!r}` |" for f in fields(kind) if f.name not in inner]
    lines = [f"\n### {title}\n", *told, "| key | default |", "|---|---|", *keys]
    for key, part in inner.items():
        lines += _section(f"{title[:-1]}.{key}]", f"{name}.{key}", part)
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m jobs.reference docs/commands.md")
    main(sys.argv[1])
