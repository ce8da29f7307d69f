"""Erasures that are repeated by their receipts while an embed brings in what the receipts mean."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import draw
from helpers import embed, rows

from facepipe.config import build
from facepipe.erasure import takeup
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.gallery import Gallery
from pipelines import erase
from pipelines.embed import EmbedConfig, run

SETTINGS: dict[str, Any] = {
    "run": {"runner": "inline", "block_smallest": 2, "block_largest": 4, "commit_seconds": 0.0},
    "source": {"identity": "folder", "name": "corpus"},
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.embed.pipeline._COMMIT_PAUSE", 0)
        patch.setattr(takeup, "_POLL_SECONDS", 0.02)
        yield


@pytest.mark.parametrize("key", ["", "0123456789abcdef" * 2])
def test_what_an_embed_brings_is_left_out(
    key: str, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup held a part of a person's images. The rest comes with an embed that is running already."""
    monkeypatch.setenv("FACEPIPE_ERASURE_KEY", key)
    source = tmp_path / "in"
    for person, numbers in (("a", range(8)), ("b", range(20, 22)), ("c", range(40, 48))):
        (source / person).mkdir(parents=True)
        for n in numbers:
            cv2.imwrite(str(source / person / f"{n:02d}.png"), draw(n, 48))
    gallery = tmp_path / "g"
    embed(source, gallery, fakes, SETTINGS)
    shutil.copytree(gallery, tmp_path / "backup")
    for n in range(22, 28):
        cv2.imwrite(str(source / "b" / f"{n}.png"), draw(n, 48))
    embed(source, gallery, fakes, SETTINGS)
    receipt = load_receipt(erase.run(Selection(identities=("b",)), str(gallery), limit=ErasureLimit(1.0)).receipts[0])
    expected = [row["uri"] for row in rows(gallery)]
    shutil.rmtree(gallery)
    (tmp_path / "backup").rename(gallery)
    # A copy under another name is known by its content.
    shutil.copy(source / "b" / "23.png", source / "c" / "zz.png")
    asked: list[Any] = []

    def ask(_: Any) -> None:
        if not asked:
            asked.append(erase.repeat([receipt], str(gallery), wait=False, limit=ErasureLimit(1.0)))

    for n in range(60, 66):
        cv2.imwrite(str(source / "a" / f"{n}.png"), draw(n, 48))
    run(build(EmbedConfig, fakes, SETTINGS, {"source": {"uri": str(source)}}), str(gallery), ask)
    erase.resume(str(gallery), wait=True)
    assert asked[0].unknown == 6
    left = [row["uri"] for row in rows(gallery)]
    assert not [uri for uri in left if "/b/" in uri]
    assert set(expected) <= set(left)
    assert not [uri for uri in left if uri_is_copy(uri)]
    again = embed(source, gallery, fakes, SETTINGS)
    assert not [row["uri"] for row in rows(gallery) if "/b/" in row["uri"] or uri_is_copy(row["uri"])]
    assert again.images == 0
    for path in Path(gallery, "erased").glob("*.json"):
        assert check_erased(Gallery(str(gallery)), load_receipt(str(path))) == []


def uri_is_copy(uri: str) -> bool:
    return uri.endswith("/zz.png")
