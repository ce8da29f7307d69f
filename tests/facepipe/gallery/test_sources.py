"""The register of sources: one name per place, and what counts as a loss."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pyarrow as pa
import pytest
from hypothesis import strategies as st

from facepipe.errors import ConfigError, GalleryError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commits.missing import TOO_MANY_MISSING, MissingGuard
from facepipe.gallery.commits.unlisted import ListingFigures
from facepipe.gallery.sources import (
    LOSS_DAYS,
    SOURCES_PROPERTY,
    GallerySource,
    Listing,
    SourceRegister,
    SourceRows,
    name_source,
    write_source,
)
from facepipe.sources import SourceConfig, SourcePlace, locate_source

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def folder(path: str) -> SourcePlace:
    return locate_source(SourceConfig(path, kind="folder"))


def listed(path: str) -> SourcePlace:
    return locate_source(SourceConfig(path, kind="list"))


def put(register: SourceRegister, place: SourcePlace, name: str | None = None) -> tuple[SourceRegister, GallerySource]:
    source = name_source(register, place, name, None)
    return register.put(source), source


def test_sources_of_one_folder_name_get_names_of_their_own() -> None:
    register = SourceRegister()
    names = []
    for path in ("/a/photos", "/b/photos", "/x/b/photos", "/photos", "/b/photos", "/a/photos"):
        register, source = put(register, folder(path))
        names.append(source.name)
    assert names == ["photos", "b/photos", "x/b/photos", "/photos", "b/photos", "photos"]
    assert len(register.sources) == 4


@hypothesis.given(st.lists(st.lists(st.sampled_from("ab"), min_size=1, max_size=4), min_size=1, max_size=8))
def test_a_name_belongs_to_one_place_whatever_the_order(paths: list[list[str]]) -> None:
    register = SourceRegister()
    for path in paths:
        register, source = put(register, folder("/" + "/".join(path)))
        assert register.find(folder("/" + "/".join(path))) == source
    names = [source.name for source in register.sources]
    assert len(names) == len(set(names)) == len({tuple(path) for path in paths})


def test_globs_of_one_folder_share_its_name(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    register = SourceRegister()
    names = set()
    for name in ("a.tar", "b.tar", "*.tar"):
        place = locate_source(SourceConfig(str(tmp_path / "shards" / name), kind="glob"))
        register, source = put(register, place)
        names.add(source.name)
    assert (names, len(register.sources)) == ({"shards"}, 3)
    one = SourceRows(register.sources[0], locate_source(SourceConfig(str(tmp_path / "shards" / "a.tar"), kind="glob")))
    uris = [f"{tmp_path}/shards/a.tar#x", f"{tmp_path}/shards/b.tar#x"]
    assert one.contains(pa.table({"source": ["shards"] * 2, "uri": uris})).tolist() == [True, False]


def test_a_name_that_two_folders_are_given_means_each_at_its_place() -> None:
    register, one = put(SourceRegister(), folder("/a/one"), "faces")
    register, two = put(register, folder("/b/two"), "faces")
    assert (one.name, two.name) == ("faces", "faces")
    rows = pa.table({"source": ["faces", "faces", "other"], "uri": ["/a/one/x.png", "/b/two/x.png", "/a/one/y.png"]})
    assert SourceRows(one, folder("/a/one")).contains(rows).tolist() == [True, False, False]
    assert SourceRows(two, folder("/b/two")).contains(rows).tolist() == [False, True, False]


def test_a_place_that_a_source_has_left_is_that_of_whoever_is_there_now() -> None:
    moved = GallerySource("faces", "/b/photos", former_roots=("/a/photos", "/old"))
    register = SourceRegister((moved,)).put(GallerySource("faces", "/a/photos", is_strict=True))
    assert [source.former_roots for source in register.sources] == [("/old",), ()]
    other = SourceRegister((moved,)).put(GallerySource("another", "/a/photos"))
    assert other.sources[0] == moved, "the name tells these two apart"
    inner = SourceRegister((moved,)).put(GallerySource("faces", "/a/photos/2024"))
    assert inner.sources[0].former_roots == ("/old",)


@pytest.mark.parametrize("first_is_list", [True, False])
def test_a_name_that_a_list_would_share_is_refused(first_is_list: bool) -> None:
    """Nobody could tell whose images are missing: those of a list may lie anywhere."""
    places = [listed("/a/faces.csv"), folder("/b/faces")]
    first, second = places if first_is_list else places[::-1]
    register, _ = put(SourceRegister(), first, "faces")
    with pytest.raises(ConfigError, match=r"--set source\.name="):
        name_source(register, second, "faces", None)
    assert name_source(register, second, None, None).name != "faces", "without a name it gets one of its own"


def test_lists_of_one_name_are_told_apart() -> None:
    register, one = put(SourceRegister(), listed("/a/list.csv"))
    register, two = put(register, listed("/b/list.csv"))
    assert (one.name, two.name) == ("list", "b/list")


def test_the_register_is_kept_in_the_table(tmp_path: Path) -> None:
    gallery = Gallery.create(str(tmp_path / "g"), Contract.from_models("fake-detector", "fake-embedder", True))
    assert SourceRegister.read(gallery) == SourceRegister()
    source = GallerySource("Fotos 𠮷", "/a/Fotos 𠮷", former_roots=("/old",), listings=(Listing("2026-01-01", 5, 0.1),))
    write_source(gallery, source)
    version = Gallery(gallery.path).version
    write_source(Gallery(gallery.path), source)
    assert Gallery(gallery.path).version == version, "what is there already needs no commit"
    assert SourceRegister.read(Gallery(gallery.path)).sources == (source,)
    assert Gallery(gallery.path).contract == gallery.contract
    for damaged in ("{", "[5]", '[{"name": "a"}]', '[{"name": "a", "root": "/a", "colour": 1}]'):
        gallery.set_property(SOURCES_PROPERTY, damaged)
        with pytest.raises(GalleryError, match="sources of the gallery cannot be read"):
            SourceRegister.read(Gallery(gallery.path))


# ---- losses


def guard(source: GallerySource, *, held: int, listed: int, at_most: float = 0.1, broken: int = 0) -> MissingGuard:
    figures = ListingFigures(listed, held, max(0, held - listed), broken, has_unlisted=True, has_contents=False)
    return MissingGuard(SourceRows(source, folder("/a")), figures, at_most)


def night(source: GallerySource, images: int, day: float, at_most: float = 0.1) -> tuple[GallerySource, str]:
    """A night on which the source lists so many images, and the gallery has those of the night before."""
    held = source.listings[-1].images if source.listings else images
    refusal = guard(source, held=held, listed=images, at_most=at_most).explain_refusal(max(0, held - images))
    if refusal:
        return source, refusal
    return source.add_listing(images, at_most, NOW + timedelta(days=day)), ""


def test_a_loss_at_once_and_a_loss_over_nights_are_refused() -> None:
    source, refusal = night(GallerySource("a", "/a"), 100, 0)
    assert not refusal
    assert night(source, 89, 1)[1].endswith(TOO_MANY_MISSING)
    refusals = []
    images = 100
    for day in range(1, 6):
        images -= 4
        source, refusal = night(source, images, day)
        refusals.append(bool(refusal))
    assert refusals == [False, False, True, True, True], "4, 8, then 12 of 100"


def test_a_loss_that_was_allowed_is_forgotten() -> None:
    source, _ = night(GallerySource("a", "/a"), 100, 0)
    assert night(source, 50, 1)[1]
    source, refusal = night(source, 50, 2, at_most=1.0)
    assert not refusal
    source, refusal = night(source, 48, 3)
    assert not refusal, "counted from 50 on"
    assert night(source, 44, 4)[1], "6 of 50"


def test_images_that_come_and_go_are_no_loss() -> None:
    """A source of the last thirty days lists as many images as ever, although none is left after a month."""
    source = GallerySource("a", "/a")
    for day in range(60):
        refusal = guard(source, held=100, listed=100).explain_refusal(4)
        assert not refusal
        source = source.add_listing(100, 0.1, NOW + timedelta(days=day))
    assert len(source.listings) == 1


def test_losses_of_long_ago_do_not_count() -> None:
    source = GallerySource("a", "/a")
    images = 1000
    for week in range(10):
        source, refusal = night(source, images, 1.5 * LOSS_DAYS * week)
        assert not refusal
        images -= 50
    assert len(source.listings) <= 2


def test_a_refused_loss_does_not_age() -> None:
    """Whoever waits a week has not repaired the source."""
    source, _ = night(GallerySource("a", "/a"), 100, 0)
    source, _ = night(source, 93, 1)
    for day in range(2, 40):
        source, refusal = night(source, 86, day)
        assert refusal, day


def test_a_broken_listing_marks_nothing() -> None:
    assert "could not be listed" in guard(GallerySource("a", "/a"), held=10, listed=10, broken=1).explain_refusal(0)


@hypothesis.given(st.lists(st.integers(0, 200), min_size=2, max_size=12))
def test_no_order_of_nights_loses_more_than_is_allowed_within_days(sizes: list[int]) -> None:
    """Of all listings that were accepted within the days, none is more than a tenth smaller than an earlier one."""
    source = GallerySource("a", "/a")
    accepted: list[int] = []
    for n, images in enumerate(sizes):
        source, refusal = night(source, images, n * 0.1)
        if not refusal:
            accepted.append(images)
            assert max(accepted) - images <= int(0.1 * max(accepted))
