"""Files that were good and are damaged now: no face is lost by it, however many they are."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import draw
from helpers import embed, rows

from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.stages import Decode


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for n in range(9):
        cv2.imwrite(str(tmp_path / "in" / f"{n}.png"), draw(n))
    return tmp_path / "in"


@pytest.mark.parametrize("data", [b"\0" * 2000, b"", b"not an image"], ids=("zeros", "empty", "text"))
def test_a_disk_that_returns_noise_costs_no_face(corpus: Path, data: bytes, fakes: dict[str, Any]) -> None:
    """Before, one night with such a disk replaced every face of the gallery by an error."""
    gallery = corpus.parent / "g"
    embed(corpus, gallery, fakes)
    before = rows(gallery)
    whole = {path: path.read_bytes() for path in corpus.iterdir()}
    for path in whole:
        path.write_bytes(data)
    for _ in range(2):
        summary = embed(corpus, gallery, fakes)
        # Three images have no face: their rows say what the files are now.
        assert [row for row in rows(gallery) if row["face_id"] is not None] == [
            row for row in before if row["face_id"] is not None
        ]
        assert Gallery(str(gallery)).counts()["decode_error"] == 3
        assert verify_gallery(Gallery(str(gallery))).problems == []
    assert summary.failed == 6, "those with faces are read again each time"
    for path, content in whole.items():
        path.write_bytes(content)
    embed(corpus, gallery, fakes)
    assert [{**row, "fingerprint": ""} for row in rows(gallery)] == [{**row, "fingerprint": ""} for row in before]


def test_damaged_and_other_images_of_one_block(corpus: Path, fakes: dict[str, Any]) -> None:
    """New images, changed ones and damaged ones come in together."""
    gallery = corpus.parent / "g"
    embed(corpus, gallery, fakes)
    before = {Path(row["uri"]).name: row for row in rows(gallery) if row["face_index"] in (0, None)}
    (corpus / "1.png").write_bytes(b"damaged")
    shutil.copy(corpus / "4.png", corpus / "2.png")
    (corpus / "new.png").write_bytes(b"damaged from the beginning")
    cv2.imwrite(str(corpus / "10.png"), draw(10))
    summary = embed(corpus, gallery, fakes)
    after = {Path(row["uri"]).name: row for row in rows(gallery) if row["face_index"] in (0, None)}
    assert (summary.images, summary.failed) == (4, 2)
    assert after["1.png"] == before["1.png"]
    assert (after["2.png"]["image_id"], after["new.png"]["status"]) == (before["4.png"]["image_id"], "decode_error")
    assert after["10.png"]["status"] == "ok"
    assert len(after) == 11
    # A good picture takes the place of the old one, also if it has no face.
    cv2.imwrite(str(corpus / "1.png"), draw(0))
    embed(corpus, gallery, fakes)
    assert [row["status"] for row in rows(gallery) if row["uri"].endswith("/1.png")] == ["no_face"]


def test_a_changed_image_that_ends_its_worker_is_not_tried_again(
    corpus: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = corpus.parent / "g"
    embed(corpus, gallery, fakes)
    before = [row for row in rows(gallery) if row["uri"].endswith("/1.png")]
    cv2.imwrite(str(corpus / "1.png"), draw(7, side=97))
    cv2.imwrite(str(corpus / "9.png"), draw(31))  # if every image fails, the images are not the cause
    with monkeypatch.context() as patch:
        patch.setattr(Decode, "decode_image", make_failing_decoder((corpus / "1.png").read_bytes()))
        summary = embed(corpus, gallery, fakes)
    assert summary.statuses["crashed"] == 1
    after = [row for row in rows(gallery) if row["uri"].endswith("/1.png")]
    assert [{**row, "fingerprint": ""} for row in after] == [{**row, "fingerprint": ""} for row in before]
    assert after[0]["fingerprint"] != before[0]["fingerprint"]
    assert embed(corpus, gallery, fakes).images == 0


def make_failing_decoder(bad: bytes) -> Any:
    """Return a decoder that fails for a file in a way that no stage expects."""
    real = Decode.decode_image

    def decode(self: Decode, data: bytes) -> Any:
        if data == bad:
            raise MemoryError
        return real(self, data)

    return decode
