"""A failure is final only for what failed it: another decoder, limit or setting tries the image again, once."""

import socket
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
from conftest import draw
from helpers import embed, rows, run_facepipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import facepipe
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.gallery.failures import RETRYABLE, RetryRule
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.imaging.decode import describe_decoders
from facepipe.stages.decode import Decode, DecodedImage

SMALL = {"decode": {"max_pixels": 96 * 110}}
LARGE = {"decode": {"max_pixels": 10**6}}
ONE_FACE = 1  # of `draw`, which gives n % 3 faces
NO_FACE = 3


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """One image of each kind: with a face, without, too large, damaged, and not there."""
    root = tmp_path / "images"
    root.mkdir()
    cv2.imwrite(str(root / "face.png"), draw(ONE_FACE))
    cv2.imwrite(str(root / "none.png"), draw(NO_FACE))
    cv2.imwrite(str(root / "large.png"), draw(ONE_FACE, 200))
    (root / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    return root


def read_statuses(gallery: Path) -> dict[str, str]:
    table = Gallery(gallery).to_arrow(["uri", "status", "face_index"]).to_pylist()
    assert max(Counter((row["uri"], row["face_index"]) for row in table).values()) == 1
    assert not verify_gallery(Gallery(gallery)).problems
    return {Path(row["uri"]).stem: row["status"] for row in table}


FIRST = {"face": "ok", "none": "no_face", "large": "too_large", "damaged": "decode_error", "gone": "read_error"}


def test_a_raised_limit_tries_what_it_had_stopped(corpus: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    gallery = tmp_path / "g"
    embed(corpus, gallery, fakes, SMALL)
    assert read_statuses(gallery) == FIRST
    again = embed(corpus, gallery, fakes, SMALL)
    assert (again.images, again.retried, again.skipped) == (1, 1, 4)  # what could not be read, as ever
    raised = embed(corpus, gallery, fakes, LARGE)
    assert (raised.retried, raised.statuses["ok"]) == (2, 1)
    assert read_statuses(gallery) == FIRST | {"large": "ok"}
    embed(corpus, tmp_path / "scratch", fakes, LARGE)
    assert rows(gallery) == rows(tmp_path / "scratch")
    # What has been embedded stays, whatever the limit becomes.
    assert embed(corpus, gallery, fakes, SMALL).images == 1


def test_another_version_tries_what_it_could_not_decode(
    corpus: Path, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(corpus, tmp_path / "g", fakes, LARGE)
    for version, retried in (("9.0", 2), ("9.0", 1), ("9.1", 2)):
        monkeypatch.setattr(facepipe, "__version__", version)
        assert embed(corpus, tmp_path / "g", fakes, LARGE).retried == retried
    table = Gallery(tmp_path / "g").to_arrow(["status", "failed_with"]).to_pylist()
    texts = {row["status"]: row["failed_with"] for row in table}
    assert texts["decode_error"] == f"facepipe 9.1, {describe_decoders()}"
    assert texts["ok"] is None
    assert texts["read_error"] is None
    assert "size=640" in texts["no_face"]


def test_another_setting_looks_for_faces_again(corpus: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    embed(corpus, tmp_path / "g", fakes, LARGE)
    larger = {"detect": {**fakes["detect"], "size": 1280}}
    # Only the image without a face, and the one that cannot be read.
    assert embed(corpus, tmp_path / "g", fakes, LARGE, larger).retried == 2
    assert embed(corpus, tmp_path / "g", fakes, LARGE, larger).retried == 1
    assert read_statuses(tmp_path / "g") == FIRST | {"large": "ok"}


@pytest.mark.parametrize("status", ["decode_error", "too_large", "no_face"])
def test_images_are_tried_again_on_request(status: str, corpus: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    embed(corpus, tmp_path / "g", fakes, SMALL)
    before = rows(tmp_path / "g")
    summary = embed(corpus, tmp_path / "g", fakes, SMALL, {"retry": {"statuses": [status]}})
    assert (summary.images, summary.retried, summary.statuses[status]) == (2, 2, 1)
    assert rows(tmp_path / "g") == before


def test_the_command_line_takes_several(corpus: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    embed(corpus, tmp_path / "g", fakes)
    words = ["embed", corpus, tmp_path / "g", "--quiet", "--set", "run.runner=inline"]
    words += ["--detector", "fake-detector", "--embedder", "fake-embedder"]
    code, out, _ = run_facepipe(*words, "--retry", "decode_error, no_face,too_large,crashed", "--json")
    assert (code, '"retried": 3' in out) == (0, True), out
    code, _, err = run_facepipe(*words, "--retry", "ok")
    assert (code, "decode_error" in err) == (2, True), err
    with pytest.raises(ConfigError, match="'ok' is not one of"):
        embed(corpus, tmp_path / "new", fakes, {"retry": {"statuses": ["ok"]}})
    assert not (tmp_path / "new").exists()


def test_a_crash_is_tried_once_more_in_the_next_run(
    corpus: Path, fakes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Decode.decode_image

    def fail(self: Decode, data: bytes) -> DecodedImage:
        if b"damaged" in data:
            raise RuntimeError("out of luck")
        return decode(self, data)

    monkeypatch.setattr(Decode, "decode_image", fail)
    # Another worker tries it again, on the same machine or another one; after that none.
    for machine, retried in (("a", 0), ("a", 2), ("a", 1), ("b", 1)):
        monkeypatch.setattr(socket, "gethostname", lambda name=machine: name)
        assert embed(corpus, tmp_path / "g", fakes).retried == retried
        assert read_statuses(tmp_path / "g")["damaged"] == "crashed"
    assert embed(corpus, tmp_path / "g", fakes, {"retry": {"statuses": ["crashed"]}}).retried == 2
    # A version in which it does not crash settles it.
    monkeypatch.undo()
    monkeypatch.setattr(facepipe, "__version__", "9.0")
    embed(corpus, tmp_path / "g", fakes)
    assert read_statuses(tmp_path / "g")["damaged"] == "decode_error"


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limits=st.lists(st.sampled_from([96 * 90, 96 * 110, 10**6]), min_size=2, max_size=4).map(sorted))
def test_rising_limits_end_in_a_gallery_from_scratch(
    limits: list[int], corpus: Path, fakes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("rising")
    for limit in limits:
        embed(corpus, root / "g", fakes, {"decode": {"max_pixels": limit}})
    embed(corpus, root / "scratch", fakes, {"decode": {"max_pixels": limits[-1]}})
    assert rows(root / "g") == rows(root / "scratch")


TEXTS = st.none() | st.sampled_from(["a", "a, on 1234", "a, on 4321", "a, twice", "b", "b, twice"])


@given(
    st.lists(st.tuples(st.sampled_from([*RETRYABLE, "ok"]), TEXTS)),
    st.sets(st.sampled_from(RETRYABLE)),
)
def test_what_is_tried_again(images: list[tuple[str, str | None]], requested: set[str]) -> None:
    rule = RetryRule({"decode_error": "a", "no_face": "a", "crashed": "a, on 1234"}, frozenset(requested))
    table = pa.table(
        {
            "status": pa.array([status for status, _ in images], pa.string()),
            "failed_with": pa.array([text for _, text in images], pa.string()),
        }
    )
    final = {"decode_error": ("a",), "no_face": ("a", None), "crashed": ("a, twice",)}
    expected = [status in requested or (status in final and text not in final[status]) for status, text in images]
    assert rule.find(table).tolist() == expected


def test_rows_of_older_versions_are_tried_once(corpus: Path, fakes: dict[str, Any], tmp_path: Path) -> None:
    """They do not say what they were tried with. Images without a face are too many to try all of them."""
    images = pa.table({"status": list(RETRYABLE), "failed_with": pa.nulls(len(RETRYABLE), pa.string())})
    rule = RetryRule({status: "a" for status in RETRYABLE if status != "read_error"})
    retried = np.array(RETRYABLE)[rule.find(images)]
    assert set(retried) == set(RETRYABLE) - {"no_face"}
