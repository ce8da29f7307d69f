"""What `--init` writes: the commented example config of a command."""

from importlib.resources import files
from pathlib import Path

import typer

from facepipe.errors import ConfigError
from jobs.console import exit_on_error


def write_example(context: typer.Context, value: bool) -> None:
    """Write the example config of the command that `--init` was given to into the current folder, and exit."""
    if not value or context.resilient_parsing:
        return
    with exit_on_error():
        write_example_config(context.info_name or "")
    raise typer.Exit


def write_example_config(command: str) -> None:
    """Write the example config of a command into the current folder, and print what to do with it.

    Args:
        command: name of the command.

    Raises:
        ConfigError: there is a file of this name, or it cannot be written.
    """
    name = f"{command.replace('-', '_')}.toml"
    try:
        # Mode x refuses to overwrite a file that the user may have edited.
        with Path(name).open("x", encoding="utf-8") as file:
            file.write((files("jobs") / name).read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ConfigError(f"{name!r} exists: move it away, or run --init in another folder") from error
    except OSError as error:
        raise ConfigError(f"cannot write {name!r}: {error.strerror}") from error
    print(f"wrote {name}: edit it, then run facepipe {command} {name}")
