"""Runs the recipes of docs/cookbook.md as they are pasted, and writes what they print into the page: `make cookbook`.

A page is Markdown. In each section that has code, these blocks count, in their order:

- ```console: lines that begin with `$ ` are typed, the lines below each are what it prints. A line `…` stands for any lines.
- ```python: code that runs with the names of the section's earlier code. What it prints is in the block ```text below it.
- Any block below a line that ends with "`NAME`:" is a file that is written first.

Every recipe finds the folder as the first section leaves it, so recipes do not depend on each other.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from s3_server import create_bucket, serve_s3
from typer.testing import CliRunner

from jobs.cli import app
from jobs.demo.photos import download_archives, make_corpus

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "cookbook.md"
DOWNLOADS = REPOSITORY / "build" / "demo" / "downloads"

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTION = re.compile(r"^## .*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([^`\s]+)`:\s*\Z")
# A number, with the unit behind it: what is measured differs with every run.
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
_MEASURED = re.compile(r" ?(s\b|ms\b|[a-z]+/s\b|[KMG]i?B\b|bytes\b)")
# What differs between machines and runs: times and run ids; how often a run commits; bytes, which depend on the length of
# paths; and the number of cores.
_VOLATILE = re.compile(
    r"\d{8}T\d{6}-[0-9a-f]{6}|\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|\+00:00)?)?"
    r"|(?:version|files|checksummed|bytes|bytes on disk)[ │]+\d+|workers \d+|\d+ workers"
)
# The lines of tables are as long as their cells.
_LAYOUT = re.compile(r"[\s─━┃│┏┓┡┩└┘┬┴┳╇┼|=-]+")
# The lines of a table between its rows: left end, line, crossing and right end.
_RULES = {"┏": "┏━┳┓", "┡": "┡━╇┩", "└": "└─┴┘"}
# A line with one of these needs a shell.
_SHELL_CHARACTERS = frozenset("|<>&;*?$")
# Numbers with decimals may differ in the last digits on another processor.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Step:
    """What a page has typed or run, and the lines that it says are printed.

    Attributes:
        code: the command, or the Python code.
        output: what the page says is printed.
        kind: `shell`, `python` or `file`.
        name: name of the file to write.
    """

    code: str
    output: str
    kind: str
    name: str = ""


@dataclass
class Section:
    """A section of a page.

    Attributes:
        title: its heading.
        text: all of it, as Markdown.
        steps: what is run.
    """

    title: str
    text: str
    steps: list[Step] = field(default_factory=list)


def read_sections(page: str) -> list[Section]:
    """Read the sections of a page that have code."""
    sections = []
    for match in _SECTION.finditer(page):
        text = match.group()
        section = Section(text.partition("\n")[0].removeprefix("## "), text, list(_read_steps(text)))
        if section.steps:
            sections.append(section)
    return sections


def _read_steps(text: str) -> Iterator[Step]:
    blocks = list(_BLOCK.finditer(text))
    for number, block in enumerate(blocks):
        language, content = block.groups()
        name = _FILE.search(text[: block.start()])
        if name:
            yield Step(content, "", "file", name.group(1))
        elif language == "console":
            for command in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
                code, _, output = command.partition("\n")
                yield Step(code, output, "shell")
        elif language == "python":
            follows = blocks[number + 1] if number + 1 < len(blocks) else None
            has_output = follows is not None and follows.group(1) == "text"
            yield Step(content, follows.group(2) if has_output and follows is not None else "", "python")


class Runner:
    """Runs steps in a folder, as a reader of the page does in a shell there."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None):
        """Prepare to run in a folder.

        Args:
            folder: the working folder of all commands.
            environment: variables that the commands see besides those of this process. A page's `export` does not
                replace them: they say where the tests' object store is.
        """
        self._folder = folder
        self._fixed = dict(environment or {})
        self._names: dict[str, Any] = {}

    def run(self, step: Step) -> str:
        """Run a step and return what it prints.

        Raises:
            RuntimeError: the step fails.
        """
        if step.kind == "file":
            path = self._folder / step.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.code, encoding="utf-8")
            return ""
        with contextlib.chdir(self._folder):
            output = self._run_python(step.code) if step.kind == "python" else self._run_shell(step.code)
        # Names below the folder are shown without it, whatever it is called here. So is the place of the command.
        shown = output.replace(f"{self._folder}/", "…/").replace(str(self._folder), "…")
        shown = shown.replace(f"{Path(sys.executable).parent}/", "…/.venv/bin/")
        return "".join(f"{line.rstrip()}\n" for line in align_tables(shown.splitlines()))

    def _run_python(self, code: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "cookbook", "exec"), self._names)
        return printed.getvalue()

    def _run_shell(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        if words[0] == "export":
            for word in words[1:]:
                name, _, value = word.partition("=")
                os.environ[name] = self._fixed.get(name, value)
            return ""
        if words[0] == "facepipe" and not _SHELL_CHARACTERS & set(line):
            # In this process, which saves a second for each.
            result = CliRunner().invoke(app, words[1:])
            if result.exit_code != 0:
                raise RuntimeError(f"{line!r} ended with {result.exit_code}:\n{result.output}") from result.exception
            return result.stdout
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euc", line], capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=250
        )
        if done.returncode != 0:
            raise RuntimeError(f"{line!r} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout


def align_tables(lines: list[str]) -> list[str]:
    """Align the tables of an output again: cells with a path have become shorter."""
    aligned: list[str] = []
    for is_table, group in groupby(lines, lambda line: line[:1] in set("┏┃┡│└")):
        block = list(group)
        aligned += _align_table(block) if is_table else block
    return aligned


def _align_table(lines: list[str]) -> list[str]:
    rows = [re.split("[┃│]", line)[1:-1] if line[0] in "┃│" else [] for line in lines]
    columns = max(map(len, rows))
    widths = [max(len(row[n].rstrip()) for row in rows if row) + 1 for n in range(columns)]
    aligned = []
    for line, row in zip(lines, rows, strict=True):
        if row:
            cells = [cell.rstrip().ljust(width) for cell, width in zip(row, widths, strict=True)]
            aligned.append(line[0] + line[0].join(cells) + line[0])
        else:
            left, rule, middle, right = _RULES[line[0]]
            aligned.append(left + middle.join(rule * width for width in widths) + right)
    return aligned


def make_start(folder: Path) -> None:
    """Fill a folder as `make demo` does: with the demo's photos."""
    photos = folder / "build" / "demo" / "photos"
    photos.mkdir(parents=True)
    make_corpus(photos, DOWNLOADS)


def differs(expected: str, actual: str) -> bool:
    """Tell whether two outputs differ in more than layout, times, sizes and the last digits of numbers."""
    was = _split(expected)
    now = _split(actual)
    if was[0] != now[0]:
        return True
    return any(not _is_close(a, b) for a, b in zip(was[1], now[1], strict=True))


def shows(expected: str, actual: str) -> bool:
    """Tell whether an output is what a page shows of it: all of it, or parts with `…` on lines between them."""
    parts = [part.splitlines() for part in re.split(r"^…\n", expected, flags=re.MULTILINE)]
    if len(parts) == 1:
        return not differs(expected, actual)
    lines = actual.splitlines()
    at = 0
    for number, part in enumerate(parts):
        if not part:
            continue
        starts = range(at, len(lines) - len(part) + 1)
        if number == 0:
            starts = range(min(1, len(starts)))
        if number == len(parts) - 1:
            starts = range(max(at, len(lines) - len(part)), len(lines) - len(part) + 1)
        text = "\n".join(part)
        found = next((n for n in starts if not differs(text, "\n".join(lines[n : n + len(part)]))), None)
        if found is None:
            return False
        at = found + len(part)
    return True


def _split(output: str) -> tuple[str, list[str]]:
    """Split an output into its text and its numbers, without what differs with each run."""
    text = _LAYOUT.sub(" ", _VOLATILE.sub("<time>", output))
    parts: list[str] = []
    numbers: list[str] = []
    end = 0
    for match in _NUMBER.finditer(text):
        parts.append(text[end : match.start()])
        end = match.end()
        if _MEASURED.match(text, end):
            parts.append("<measured>")
            continue
        numbers.append(match.group().replace(",", ""))
        parts.append("<number>")
    return "".join([*parts, text[end:]]).strip(), numbers


def _is_close(was: str, now: str) -> bool:
    if "." not in was + now:
        return was == now
    return abs(float(was) - float(now)) <= _TOLERANCE * max(1.0, abs(float(was)))


def render(section: Section, outputs: list[str]) -> str:
    """Return a section with the outputs of its steps in place of those that it has."""
    steps = iter(zip(section.steps, outputs, strict=True))

    def rewrite(match: re.Match[str]) -> str:
        nonlocal printed
        language, content = match.groups()
        if _FILE.search(section.text[: match.start()]):
            next(steps)
            return match.group()
        if language == "console":
            lines = []
            for _ in re.findall(r"^\$ ", content, flags=re.MULTILINE):
                step, output = next(steps)
                lines.append(f"$ {step.code}\n{output}")
            return f"```console\n{''.join(lines)}```"
        if language == "python":
            printed = next(steps)[1]
        elif language == "text":
            return f"```text\n{printed}```"
        return match.group()

    printed = ""
    return _BLOCK.sub(rewrite, section.text)


def keep_equal(section: Section, outputs: list[str]) -> list[str]:
    """Keep the outputs that a page has, parts as well, if they differ in nothing that counts."""
    return [
        step.output if shows(step.output, output) else output
        for step, output in zip(section.steps, outputs, strict=True)
    ]


def main(chosen: list[str]) -> None:
    """Run recipes and write their outputs into the page.

    Args:
        chosen: how the titles of the recipes begin, such as `11.`; all by default.
    """
    download_archives(DOWNLOADS)
    start, *recipes = read_sections(PAGE.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(prefix="facepipe-cookbook-") as name, serve_s3() as endpoint:
        create_bucket(endpoint, "faces")
        folder = Path(name).resolve() / "work"
        kept = folder.with_name("kept")
        folder.mkdir()
        make_start(folder)
        for section in (start, *recipes):
            if section is not start and chosen and not section.title.startswith(tuple(chosen)):
                continue
            print(section.title, flush=True)
            if section is not start:
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)
            runner = Runner(folder, {"AWS_ENDPOINT_URL": endpoint})
            outputs = [runner.run(step) for step in section.steps]
            if section is start:
                shutil.copytree(folder, kept)
            # The page may have been edited meanwhile, in other sections.
            page = PAGE.read_text(encoding="utf-8")
            page = page.replace(section.text, render(section, keep_equal(section, outputs)))
            PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
