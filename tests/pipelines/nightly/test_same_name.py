"""Two sources of one name: no night takes the images of one for missing from the other."""

from pathlib import Path
from typing import Any

import cv2
import pytest
from conftest import draw
from helpers import embed, rows, run_facepipe

from facepipe.config import build
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from pipelines.nightly import run
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.pipeline import NightSummary

Settings = dict[str, Any]


def make_photos(folder: Path, numbers: range) -> Path:
    folder.mkdir(parents=True)
    for n in numbers:
        cv2.imwrite(str(folder / f"{n}.png"), draw(n))
    return folder


def night(
    fakes: Settings, gallery: Path, *sources: Settings, at_most: float = 1.0, retention_at_most: float | None = 1.0
) -> NightSummary:
    config = {
        "gallery": str(gallery),
        "source": [{"missing": "erase", **source} for source in sources],
        "night": {"dedup": False, "clusters": "no", "missing_at_most": at_most, "retention_at_most": retention_at_most},
        "run": {"runner": "inline"},
    }
    return run(build(NightlyConfig, fakes, config))


def names(gallery: Path, place: str) -> set[str]:
    """Images that the gallery has of a place, which are not missing."""
    found = [row for row in rows(gallery) if row["missing_since"] is None]
    return {Path(row["uri"]).name for row in found if f"/{place}/" in row["uri"]}


@pytest.mark.parametrize("name", [None, "photos"])
@pytest.mark.parametrize("second", ["erase", "mark", "keep"])
def test_nights_of_two_configs(name: str | None, second: str, fakes: Settings, tmp_path: Path) -> None:
    """Both folders are called photos, or both configs say so."""
    one, two = make_photos(tmp_path / "a" / "photos", range(12)), make_photos(tmp_path / "b" / "photos", range(20, 23))
    g = tmp_path / "g"
    first_source: Settings = {"uri": str(one), "name": name}
    second_source: Settings = {"uri": str(two), "name": name, "missing": second}
    for _ in range(2):
        assert night(fakes, g, first_source).failures == []
        assert night(fakes, g, second_source).failures == []
        assert (len(names(g, "a")), len(names(g, "b"))) == (12, 3)
    # What is missing from one is missing from it alone.
    (one / "5.png").unlink()
    (two / "21.png").unlink()
    night(fakes, g, second_source)
    assert (len(names(g, "a")), len(names(g, "b"))) == (12, 3 if second == "keep" else 2)
    night(fakes, g, first_source)
    assert (len(names(g, "a")), len(names(g, "b"))) == (11, 3 if second == "keep" else 2)
    marked = [row for row in rows(g) if row["missing_since"] is not None]
    assert {Path(row["uri"]).name for row in marked} == ({"21.png"} if second == "mark" else set()), "only by its own"
    assert verify_gallery(Gallery(str(g))).problems == []


def test_both_in_one_config(fakes: Settings, tmp_path: Path) -> None:
    for place, numbers in (("a", range(6)), ("b", range(20, 23))):
        make_photos(tmp_path / place / "photos", numbers)
    sources = [{"uri": str(tmp_path / place / "photos")} for place in "ab"]
    for _ in range(2):
        summary = night(fakes, tmp_path / "g", *sources)
        assert summary.failures == []
        assert (len(names(tmp_path / "g", "a")), len(names(tmp_path / "g", "b"))) == (6, 3)
    assert {"embed photos", "embed b/photos"} <= summary.steps.keys()


@pytest.mark.parametrize("settings", [[], ["--set", "source.name=photos"]])
def test_an_embed_by_hand_between_nights(settings: list[str], fakes: Settings, tmp_path: Path) -> None:
    one, two = make_photos(tmp_path / "a" / "photos", range(12)), make_photos(tmp_path / "b" / "photos", range(20, 21))
    g = tmp_path / "g"
    night(fakes, g, {"uri": str(one)}, at_most=0.1)
    models = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline"]
    mark = ["--set", "missing.policy=mark", "--set", "missing.at_most=1"]
    code, _, _ = run_facepipe("embed", two, g, *models, *mark, *settings, "--quiet")
    assert code == 0
    for _ in range(2):
        assert night(fakes, g, {"uri": str(one)}, at_most=0.1).failures == []
        assert (len(names(g, "a")), len(names(g, "b"))) == (12, 1)


def test_an_older_gallery_in_which_both_have_one_name(fakes: Settings, tmp_path: Path) -> None:
    one, two = make_photos(tmp_path / "a" / "photos", range(6)), make_photos(tmp_path / "b" / "photos", range(20, 23))
    g = tmp_path / "g"
    for place in (one, two):
        embed(place, g, fakes, {"source": {"name": "photos"}})
    Gallery(str(g)).set_property("facepipe.sources", "[]")
    for _ in range(2):
        for place in (one, two):
            assert night(fakes, g, {"uri": str(place)}).failures == []
            assert (len(names(g, "a")), len(names(g, "b"))) == (6, 3)
    (two / "20.png").unlink()
    night(fakes, g, {"uri": str(one)})
    assert len(names(g, "b")) == 3
    night(fakes, g, {"uri": str(two)})
    assert (len(names(g, "a")), len(names(g, "b"))) == (6, 2)


def test_retention_takes_the_images_of_its_own_place(fakes: Settings, tmp_path: Path) -> None:
    one, two = make_photos(tmp_path / "a" / "photos", range(6)), make_photos(tmp_path / "b" / "photos", range(20, 23))
    g = tmp_path / "g"
    night(fakes, g, {"uri": str(two), "name": "photos"})
    summary = night(fakes, g, {"uri": str(one), "name": "photos", "retention_days": 1e-9})
    assert summary.steps["erase retention photos"]["images"] == 6
    assert len(names(g, "b")) == 3


def test_the_limit_is_of_its_own_place(fakes: Settings, tmp_path: Path) -> None:
    """A small source is not emptied because a large one has its name."""
    one, two = make_photos(tmp_path / "a" / "photos", range(3)), make_photos(tmp_path / "b" / "photos", range(20, 60))
    g = tmp_path / "g"
    small = {"uri": str(one), "name": "photos", "retention_days": 1e-9}
    night(fakes, g, {"uri": str(one), "name": "photos"})
    night(fakes, g, {"uri": str(two), "name": "photos"})
    summary = night(fakes, g, small, retention_at_most=0.1)
    assert "4 of the 4 rows of the source 'photos'" in summary.failures[0]
    assert len(names(g, "a")) == 3


def test_an_absent_source_does_not_stop_the_night(fakes: Settings, tmp_path: Path) -> None:
    one = make_photos(tmp_path / "a" / "photos", range(6))
    absent = {"uri": str(tmp_path / "absent" / "photos")}
    summary = night(fakes, tmp_path / "g", absent, {"uri": str(one)})
    assert len(summary.failures) == 1
    assert "no such file or folder" in summary.failures[0]
    assert len(names(tmp_path / "g", "a")) == 6


def test_losses_over_nights_are_refused(fakes: Settings, tmp_path: Path) -> None:
    """A tenth a night is a third in a week: the disk is failing, and nobody's images go."""
    one = make_photos(tmp_path / "a" / "photos", range(30))
    g = tmp_path / "g"
    source = {"uri": str(one)}
    night(fakes, g, source, at_most=0.1)
    left = []
    for n in range(0, 10, 2):
        for name in (n, n + 1):
            (one / f"{name}.png").unlink()
        summary = night(fakes, g, source, at_most=0.1)
        left.append((len(names(g, "a")), bool(summary.failures)))
    assert left == [(28, False), (28, True), (28, True), (28, True), (28, True)]
    assert "more than night.missing_at_most allows" in summary.failures[0]
    summary = night(fakes, g, source, at_most=1.0)
    assert (len(names(g, "a")), summary.failures) == (20, [])
    (one / "10.png").unlink()
    assert night(fakes, g, source, at_most=0.1).failures == [], "what was allowed counts no more"
    assert len(names(g, "a")) == 19
