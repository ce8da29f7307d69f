"""The recipes of docs/cookbook.md run as they are pasted, and print what the page says.

They need the photos of the demo, which `make test` downloads into the clone as it does packages. Without them they skip.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cookbook import DOWNLOADS, PAGE, Runner, Section, differs, make_start, read_sections, shows
from s3_server import create_bucket

from facepipe import storage
from jobs.demo.photos import has_archives

README = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
START, *RECIPES = read_sections(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def environment(s3_server: str) -> Iterator[dict[str, str]]:
    """The object store of the recipes. What they export is gone afterwards."""
    before = dict(os.environ)
    create_bucket(s3_server, "faces")
    fixed = {"AWS_ENDPOINT_URL": s3_server}
    storage.open_bucket.cache_clear()
    yield fixed
    os.environ.clear()
    os.environ.update(before)
    storage.open_bucket.cache_clear()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The folder that the first section leaves."""
    if not has_archives(DOWNLOADS):
        pytest.skip(f"needs the photos of the demo: python -m jobs.demo.photos {DOWNLOADS}")
    folder = tmp_path_factory.mktemp("cookbook").resolve() / "work"
    folder.mkdir()
    make_start(folder)
    check(START, folder, environment)
    shutil.copytree(folder, folder.with_name("kept"))
    return folder


def restore(folder: Path) -> None:
    """Put back what the first section left."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("kept"), folder)


def check(section: Section, folder: Path, environment: dict[str, str]) -> None:
    runner = Runner(folder, environment)
    for step in section.steps:
        output = runner.run(step)
        assert shows(step.output, output), f"{step.code}\nprinted\n{output}\nrun `make cookbook`"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)
def test_a_recipe_prints_what_the_page_says(recipe: Section, start: Path, environment: dict[str, str]) -> None:
    restore(start)
    check(recipe, start, environment)


def test_the_readme_shows_what_is_printed(start: Path, environment: dict[str, str]) -> None:
    """Each line that the README shows below a command is one of those that it prints."""
    restore(start)
    shutil.rmtree(start / "gallery")
    (start / "new_photos").mkdir()
    shutil.copy(start / "build" / "demo" / "photos" / "obama_4.jpg", start / "new_photos")
    section = next(each for each in read_sections(README) if each.title == "Ten lines of shell")
    runner = Runner(start, environment)
    for step in section.steps:
        if step.kind != "shell":
            continue
        printed = runner.run(step).splitlines()
        for line in step.output.splitlines():
            assert any(not differs(line, other) for other in printed), (
                f"{line}\nis not what {step.code} prints: {printed}"
            )


@pytest.mark.parametrize(
    ("page", "printed", "expected"),
    [
        ("a 1.0\n", "a 1.01\n", True),
        ("a 3\n", "a 4\n", False),
        ("a 3 s\n", "a 4.5 s\n", True),
        ("a\n…\nc\n", "a\nb\nc\n", True),
        ("a\n…\n", "a\nb\nc\n", True),
        ("…\nc\n", "a\nb\nc\n", True),
        ("…\nb\n", "a\nb\nc\n", False),
        ("b\n…\n", "a\nb\nc\n", False),
        ("…\nb\na\n…\n", "a\nb\nc\n", False),
        ("a\n", "a\nb\n", False),
    ],
)
def test_what_differs(page: str, printed: str, expected: bool) -> None:
    assert shows(page, printed) is expected


def test_there_are_ten_recipes_or_more() -> None:
    assert len(RECIPES) >= 10
