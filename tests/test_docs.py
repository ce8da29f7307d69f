"""Every command, config and piece of code in the documents is valid as it is pasted.

Recipes and the runbook run in tests/test_cookbook.py, tests/jobs/test_runbook.py and tests/test_readme.py. Here the command
line of everything else is parsed: commands and options exist, arguments are complete, and values and settings are accepted.
"""

import ast
import re
import shlex
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import REPOSITORY

from facepipe.config import build, parse_settings
from facepipe.errors import ConfigError
from jobs.cli import app
from jobs.settings import CONFIG_CLASSES

PAGES = sorted(
    path
    for path in [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md"), *(REPOSITORY / "infra").rglob("*.md")]
    if path.name != "CHANGELOG.md"
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^(?: {4}.*)?\n)+", re.MULTILINE)
_INLINE = re.compile(r"`((?:\S*/)?facepipe\s[^`]+)`")
_COMMAND = re.compile(r"(?:\S*/)?facepipe")
# Words behind a command that are not a comment would be its arguments.
_REMARK = re.compile(r"\S {3,}[^\s#]")
_SHELLS = ("", "bash", "console", "crontab")
# Options that answer while the command line is parsed.
_EAGER = {"--help", "-h", "--version", "--init", "--help-settings"}
_END = {"|", ">", ">>", "<", "&&", ";", "&", "||"}


def read_blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield language and content of the fenced and the indented blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCED.finditer(text):
        yield match.group(1), match.group(2)
    for match in _INDENTED.finditer(_FENCED.sub("", text)):
        yield "", textwrap.dedent(match.group())


def read_lines(page: Path) -> Iterator[str]:
    """Yield the lines with a facepipe command in the blocks of a page."""
    for language, content in read_blocks(page):
        if language not in _SHELLS:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            command = line.removeprefix("$ ")
            if language == "console" and command == line:
                continue  # what a command prints
            if re.match(rf"(?:[\d*]+ ){{5}}.*|{_COMMAND.pattern} (?! )", command) and "[OPTIONS]" not in command:
                yield command


def split_commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each facepipe command of a line, after the name."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words: list[str] | None = None
    for word in lexer:
        if word in _END or re.fullmatch(r"\d?>>?|>&\d?|2>&1", word):
            if words is not None:
                yield words
            words = None
        elif words is None and _COMMAND.fullmatch(word):
            words = []
        elif words is not None:
            words.append(word)
    if words is not None:
        yield words


def parse_command(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parse a command line as facepipe does, without running it; return the command's name and the options."""
    context: Any = None
    command: Any = typer.main.get_command(app)
    name = "facepipe"
    rest = [word for word in words if word not in _EAGER]
    is_answered = rest != words
    while True:
        # What answers at once needs no arguments.
        context = command.make_context(name, rest, parent=context, resilient_parsing=is_answered)
        rest = [*context._protected_args, *context.args]
        if not hasattr(command, "resolve_command") or not rest:
            return name, dict(context.params)
        name, command, rest = command.resolve_command(context, rest)


def check_settings(command: str, settings: list[str]) -> None:
    """Raise ConfigError unless a command has these settings and takes their values."""
    kinds = [_import_class(path) for path in CONFIG_CLASSES[command]]
    _build_any(kinds, parse_settings(settings))


def _import_class(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _build_any(kinds: list[Any], tree: dict[str, Any]) -> None:
    for kind in kinds[:-1]:
        try:
            build(kind, tree)
        except ConfigError:
            continue
        return
    build(kinds[-1], tree)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_valid(page: Path) -> None:
    problems = []
    for line in read_lines(page):
        if _REMARK.search(line):
            problems.append(f"{line}: a remark begins with #")
        for words in split_commands(line):
            try:
                name, options = parse_command(words)
                if options.get("settings"):
                    check_settings(name, options["settings"])
            except Exception as error:
                problems.append(f"{line}: {getattr(error, 'message', '') or error}")
    assert problems == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist(page: Path) -> None:
    """They may lack arguments: `facepipe index` names a command."""
    names = {"JOB", "COMMAND", "..."}
    group: Any = typer.main.get_command(app)
    problems = []
    for code in _INLINE.findall(page.read_text(encoding="utf-8")):
        for words in split_commands(" ".join(code.split())):
            rest = [word for word in words if not word.startswith("-")]
            command = group.commands.get(rest[0]) if rest else group
            if command is None and rest[0] not in names:
                problems.append(code)
                continue
            inner = getattr(command, "commands", {}) if command else {}
            command = inner.get(rest[1], command) if len(rest) > 1 else command
            known = {
                option for each in (group, command) if each for parameter in each.params for option in parameter.opts
            }
            known |= _EAGER
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            if command and used - known:
                problems.append(f"{code}: no option {', '.join(sorted(used - known))}")
    assert problems == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_are_valid(page: Path) -> None:
    kinds = [_import_class(path) for paths in CONFIG_CLASSES.values() for path in paths]
    for language, content in read_blocks(page):
        if language != "toml":
            continue
        tree = tomllib.loads(content)
        # A model's card is no config of a command; tests of the models read it.
        if page.name != "models.md":
            _build_any(kinds, tree)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_valid(page: Path) -> None:
    shell = []
    for language, content in read_blocks(page):
        if language == "python" and not content.startswith(">>> "):
            ast.parse(content)
        elif language == "bash":
            shell.append(content)
    done = subprocess.run(["bash", "-n"], input="\n".join(shell), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_tests_that_the_table_of_stumbles_names_exist() -> None:
    rows = re.findall(r"^\| (\d+) \|.*$", (REPOSITORY / "docs" / "newcomers.md").read_text(), re.MULTILINE)
    assert [int(number) for number in rows] == list(range(1, 49))
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (REPOSITORY / "docs" / "newcomers.md").read_text())
    files: dict[str, str] = {}
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text()
    assert [f"{file}::{test}" for file, test in named if f"def {test}(" not in files.get(file, "")] == []


def test_a_mistake_is_found() -> None:
    """Without this, the tests above would prove nothing."""
    for line in (
        "facepipe embedd photos/ gallery/",
        "facepipe embed photos/",
        "facepipe embed photos/ gallery/ --identity nobody",
        "facepipe info gallery/    counts, and writes nothing",
        "facepipe nightly night.toml --dryrun",
        "15 2 * * * /srv/.venv/bin/facepipe nightly a.toml b.toml c.toml >> night.log 2>&1",
    ):
        (words,) = split_commands(line)
        with pytest.raises(Exception, match=r"\w"):
            parse_command(words)
    with pytest.raises(ConfigError):
        check_settings("embed", ["detect.sise=3"])
    assert _REMARK.search("facepipe erase gallery/ --identity Jane    counts, and writes nothing")
    assert list(split_commands("cd x && facepipe info g | head; facepipe verify g")) == [["info", "g"], ["verify", "g"]]
