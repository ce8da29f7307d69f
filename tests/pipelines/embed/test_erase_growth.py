"""An erasure that is recorded does not grow to most of the gallery by what comes in later."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as drawn
from conftest import draw
from helpers import embed, rows

from facepipe.config import build
from facepipe.erasure import takeup
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.selection import Selection
from facepipe.errors import StorageError
from facepipe.gallery import Gallery
from pipelines import erase
from pipelines.embed import EmbedConfig, run

SMALL_BLOCKS: dict[str, Any] = {"run": {"runner": "inline", "block_smallest": 2, "block_largest": 4}}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.embed.pipeline._COMMIT_PAUSE", 0)
        patch.setattr(takeup, "_POLL_SECONDS", 0.02)
        yield


def fill(folder: Path, person: str, numbers: range) -> None:
    (folder / person).mkdir(parents=True, exist_ok=True)
    for n in numbers:
        cv2.imwrite(str(folder / person / f"{n:03d}.png"), draw(n, 48))


@pytest.mark.parametrize("selection", [Selection(identities=("person1",)), Selection(uri="*/000000004.jpg")])
def test_between_its_record_and_its_end(selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels were read wrongly meanwhile, and half of the gallery has the name."""
    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    persons = np.repeat(np.arange(8), 4)
    append(gallery, [drawn(persons, Faces().draw(persons, 0), 0)], "20261101T000000-000000")

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("facepipe.erasure.steps.rewrite_files", fail)
        with pytest.raises(StorageError):
            erase.run(selection, gallery.path, limit=ErasureLimit(0.5))
    many = np.ones(60, np.int64)
    append(gallery, [drawn(many, Faces().draw(many, 1), 100)], "20261101T000000-000001")
    summary = erase.resume(gallery.path)
    left = Gallery(gallery.path).to_arrow(["identity"])["identity"].to_pylist()
    is_named = bool(selection.identities)
    assert (left.count("person1"), len(left)) == ((60, 88) if is_named else (63, 91))
    assert ("come" in " ".join(summary.doubts) or "came" in " ".join(summary.doubts)) == is_named


def test_beyond_the_limit_a_running_embed_keeps_nothing_out(tmp_path: Path, fakes: dict[str, Any]) -> None:
    """It leaves out all that has the name, and the next run brings in what nobody has confirmed."""
    fill(tmp_path / "in", "a", range(12))
    fill(tmp_path / "in", "b", range(20, 24))
    gallery = tmp_path / "g"
    labels: dict[str, Any] = {"source": {"identity": "folder", "name": "corpus"}}
    embed(tmp_path / "in", gallery, fakes, SMALL_BLOCKS, labels)
    fill(tmp_path / "in", "b", range(24, 72))
    asked: list[Any] = []

    def ask(_: Any) -> None:
        if not asked:
            asked.append(erase.run(Selection(identities=("b",)), str(gallery), wait=False))

    config = build(EmbedConfig, fakes, SMALL_BLOCKS, labels, {"source": {"uri": str(tmp_path / "in")}})
    run(config, str(gallery), ask)
    assert {row["identity"] for row in rows(gallery)} <= {"a", None}
    again = embed(tmp_path / "in", gallery, fakes, SMALL_BLOCKS, labels)
    assert 20 < again.images < 48
    assert again.erased > 4


@pytest.mark.parametrize("selection", [Selection(older_than_days=30.0), Selection(missing=True)])
def test_what_comes_later_is_not_older_or_missing(
    selection: Selection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of a machine that embeds lies years back, or a source was not mounted, while an erasure waits."""
    now = datetime.now(UTC)
    old = now - timedelta(days=400)

    def make_rows(count: int, first: int, time: datetime) -> pa.Table:
        persons = np.full(count, first)
        table = drawn(persons, Faces().draw(persons, first), first)
        name = "ingested_at" if selection.older_than_days else "missing_since"
        value = time if name == "ingested_at" or time == old else None
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(at), pa.array([value] * count, table.schema.field(at).type))

    gallery = Gallery.create(str(tmp_path / "g"), CONTRACT)
    append(gallery, [make_rows(4, 0, old), make_rows(40, 100, now)], "20261101T000000-000000")

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("the power failed")

    with monkeypatch.context() as patch:
        patch.setattr("facepipe.erasure.steps.rewrite_files", fail)
        with pytest.raises(StorageError):
            erase.run(selection, gallery.path, limit=ErasureLimit(0.5, confirmed=(4,)))
    append(gallery, [make_rows(20, 200, old)], "20261101T000000-000001")
    erase.resume(gallery.path)
    assert set(Gallery(gallery.path).to_arrow(["identity"])["identity"].to_pylist()) == {"person100", "person200"}
