"""What `facepipe nightly --init PHOTOS GALLERY` writes and prints: a short config, and lines for cron and systemd."""

import os
import shlex
import shutil
import sys

from facepipe import storage
from facepipe.errors import ConfigError
from facepipe.sources import SourceConfig, locate_source
from facepipe.sources.extensions import is_web_url
from facepipe.storage.error_text import describe_error

_NAME = "nightly.toml"
_HOUR = 2
_MINUTE = 15

_CONFIG = """# Every night: `facepipe nightly {name}`. First try `facepipe nightly {name} --check`, then --dry-run.
# `facepipe nightly --help-settings` lists all settings. Keep credentials out of this file.

gallery = {gallery}  # the first night creates it

[[source]]  # one per corpus
uri = {uri}  # new and changed images are embedded every night
name = {source}  # do not change it later
missing = "mark"  # images that are gone get a time in `missing_since`; or "erase" (the same night), "keep" (an inbox)
# retention_days = 30  # erase images this long after they were embedded

[night]
max_failed = 0.01  # if more of the new images fail, the exit code is 3
clusters = "make"  # people: the first night makes clusters, later ones add to them; or "assign", "no"
"""


def write_night_config(photos: str, gallery: str) -> str:
    """Write a config of the nightly job into the working folder.

    Args:
        photos: what `embed` takes as a source.
        gallery: folder or URL of the gallery.

    Returns:
        The absolute path of the file.

    Raises:
        ConfigError: there is a file of this name, it cannot be written, or a name cannot stand in a TOML file.
    """
    path = os.path.abspath(_NAME)
    # Absolute paths mean the same wherever the night is started from.
    uri = photos if is_web_url(photos) else storage.to_absolute(photos)
    source = locate_source(SourceConfig(photos)).name
    text = _CONFIG.format(
        name=_NAME,
        gallery=format_toml_text(storage.to_absolute(gallery)),
        uri=format_toml_text(uri),
        source=format_toml_text(source),
    )
    try:
        # Mode x refuses to overwrite a file that the user may have edited.
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{_NAME!r} exists: move it away, or run --init in another folder") from error
    except OSError as error:
        raise ConfigError(f"cannot write {_NAME!r}: {describe_error(error)}") from error
    return path


def format_toml_text(text: str) -> str:
    """Format a text as a basic string of TOML.

    Raises:
        ConfigError: the text is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r} is not UTF-8: choose a name that is") from error
    escaped = "".join(_escape(character) for character in text)
    return f'"{escaped}"'


def _escape(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    # TOML allows no control character, and no delete character.
    return f"\\u{ord(character):04x}" if ord(character) < 0x20 or ord(character) == 0x7F else character


def find_program() -> list[str]:
    """Find the words that start this facepipe without a shell's PATH, as cron and systemd need them."""
    program = shutil.which(sys.argv[0]) or ""
    if os.path.basename(program) == "facepipe":
        return [os.path.abspath(program)]
    beside = os.path.join(os.path.dirname(sys.executable), "facepipe")
    return [beside] if os.access(beside, os.X_OK) else [sys.executable, "-m", "jobs.cli"]


def format_crontab(program: list[str], config: str) -> str:
    """Format the line of a crontab that runs a night; its messages are appended to a log beside the config."""
    log = os.path.splitext(config)[0] + ".log"
    command = shlex.join([*program, "--log-format", "json", "nightly", config, "--quiet"])
    line = f"{command} >> {shlex.quote(log)} 2>&1"
    # A percent sign ends the command of a crontab.
    return f"{_MINUTE} {_HOUR} * * * " + line.replace("%", r"\%")


def format_service(program: list[str], config: str) -> str:
    """Format the unit of systemd that runs a night."""
    words = [*program, "--log-format", "json", "nightly", config, "--quiet"]
    command = " ".join(_quote_for_systemd(word) for word in words)
    return f"[Unit]\nDescription=facepipe nightly\n\n[Service]\nType=oneshot\nExecStart={command}\n"


def format_timer() -> str:
    """Format the timer of systemd that starts the unit every night, also one that a machine slept through."""
    calendar = f"*-*-* {_HOUR:02}:{_MINUTE:02}:00"
    return f"[Timer]\nOnCalendar={calendar}\nPersistent=true\n\n[Install]\nWantedBy=timers.target\n"


def _quote_for_systemd(word: str) -> str:
    """Quote a word of ExecStart=, in which %, $ and backslashes have a meaning."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or not word or any(mark in word for mark in " \t'") else word


def print_next_steps(config: str) -> None:
    """Print what to type next: the check, and the lines for cron and systemd."""
    program = find_program()
    print(f"wrote {config}")
    print(f"\ntry it:\n  facepipe nightly {shlex.quote(config)} --check")
    print(f"\nevery night by cron (crontab -e), one line:\n{format_crontab(program, config)}")
    print("\nor by systemd: ~/.config/systemd/user/facepipe.service")
    print(_indent(format_service(program, config)))
    print("and ~/.config/systemd/user/facepipe.timer")
    print(_indent(format_timer()))
    print("then: systemctl --user enable --now facepipe.timer")


def _indent(text: str) -> str:
    return "".join(f"  {line}".rstrip() + "\n" for line in text.splitlines())
