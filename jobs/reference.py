"""Writes docs/commands.md from the commands' own help: `python -m jobs.reference docs/commands.md`."""

import inspect
import sys
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from jobs.cli import app

_HEAD = """# Commands

Written by `python -m jobs.reference docs/commands.md` from the commands' help.

Results go to stdout, progress and messages to stderr. Exit codes: 0 done; 1 failed; 2 wrong usage; 3 finished, but
above the error budget; 130 and 143 interrupted by Ctrl-C or SIGTERM with all finished work committed.

Commands that take `--config FILE.toml` and `--set section.key=value` list their settings with `--help-settings`, such
as `facepipe embed --help-settings`.
"""


def main(path: str) -> None:
    """Write the reference to a file."""
    commands = list(list_commands())
    contents = "".join(format_entry(name, command) for name, command in commands)
    sections = "".join(format_command(name, command) for name, command in commands)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{_HEAD}\n{contents}{sections}")


def list_commands() -> Iterator[tuple[str, Any]]:
    """Yield the name and the click command of every command, those of groups included."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        # A group is listed itself only if it does something without a subcommand.
        inner = getattr(command, "commands", {})
        if not inner or command.invoke_without_command:
            yield name, command
        for inner_name, inner_command in inner.items():
            yield f"{name} {inner_name}", inner_command


def format_entry(name: str, command: Any) -> str:
    """Format the line of a command in the table of contents: its name as a link, and the first sentence of its help."""
    anchor = f"facepipe-{name}".replace(" ", "-")
    return f"- [{name}](#{anchor}): {inspect.cleandoc(command.help).splitlines()[0]}\n"


def format_command(name: str, command: Any) -> str:
    """Format the help of one command as a section of Markdown.

    Args:
        name: name of the command, with that of its group.
        command: the click command.
    """
    # Write the heading, the usage and the help.
    arguments = [parameter for parameter in command.params if _is_argument(parameter)]
    usage = " ".join(["facepipe", name, *map(_format_metavar, arguments), "[OPTIONS]"])
    lines = [f"\n## facepipe {name}\n", f"    {usage}\n", inspect.cleandoc(command.help) + "\n"]
    # Write one row per argument or option; hidden ones and `--help` are left out.
    lines += ["| argument or option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        if _is_argument(parameter):
            names = _format_metavar(parameter)
        else:
            names = ", ".join(f"`{option}`" for option in parameter.opts)
            if parameter.metavar:
                names += f" {parameter.metavar}"
        default = _format_default(parameter)
        lines.append(f"| {names} | {default} | {parameter.help or ''}{_format_choices(command, parameter)} |")
    return "\n".join(lines) + "\n"


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _format_metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _format_default(parameter: Any) -> str:
    """Format the value that holds if an option is not given; nothing for a flag, or if there is none."""
    if getattr(parameter, "is_flag", False):
        return ""
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _format_choices(command: Any, parameter: Any) -> str:
    """Format the fixed choices of an option; nothing if it has none.

    They are read from the annotation, because typer has no public name for them.
    """
    # An optional choice is a union, so look at the parts of the annotation as well.
    hint = get_type_hints(inspect.unwrap(command.callback))[parameter.name]
    for kind in (hint, *get_args(hint)):
        if get_origin(kind) is Literal:
            return f" One of {', '.join(get_args(kind))}."
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m jobs.reference docs/commands.md")
    main(sys.argv[1])
