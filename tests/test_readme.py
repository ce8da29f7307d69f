"""The Python code of the README runs as it stands there."""

import re
from pathlib import Path

import cv2
import pytest
from conftest import REPOSITORY, draw

from facepipe.config import build
from facepipe.stages import Detect, Embed
from pipelines import index
from pipelines.embed import EmbedConfig, run

BLOCKS = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gallery and the photos that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    photos = folder / "photos"
    photos.mkdir()
    for n in range(1, 13):
        cv2.imwrite(str(photos / f"biden_{n}.png"), draw(n, 48))
    models = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    config = build(
        EmbedConfig, models, {"source": {"uri": str(photos), "identity": "filename"}, "run": {"runner": "inline"}}
    )
    run(config, str(folder / "gallery"))
    index.run(index.IndexConfig(), str(folder / "gallery"))
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(folder / name), draw(4, 96))
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_block_runs(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fake models, so that it takes no time."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Detect, "__init__", _with_default(Detect, "fake-detector"))
    monkeypatch.setattr(Embed, "__init__", _with_default(Embed, "fake-embedder"))
    code = "import facepipe\n" + re.sub(r"^(>>> |\.\.\. )", "", _drop_output(BLOCKS[number]), flags=re.MULTILINE)
    exec(compile(code, f"README, block {number + 1}", "exec"), {})


def _with_default(stage: type, model: str) -> object:
    original = stage.__init__  # type: ignore[misc]
    return lambda self, **options: original(self, **{"model": model, **options})


def _drop_output(block: str) -> str:
    """Drop what a session of the interpreter printed."""
    if not block.startswith(">>> "):
        return block
    return "".join(line for line in block.splitlines(keepends=True) if line.startswith((">>> ", "... ")))


def test_the_readme_has_code() -> None:
    assert len(BLOCKS) >= 5
