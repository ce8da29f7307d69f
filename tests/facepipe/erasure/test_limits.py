"""How much may be erased without asking, and when a clock is believed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as drawn
from hypothesis import given
from hypothesis import strategies as st

from facepipe import storage
from facepipe.erasure import clock as clocks
from facepipe.erasure import selection as selections
from facepipe.erasure.clock import MAX_GAP, ClockReading, read_clock, select_erasable
from facepipe.erasure.limits import (
    ErasureLimit,
    RecentErasures,
    check_limit,
    choose_limit,
    choose_total_share,
    count_rows,
    explain_excess,
)
from facepipe.erasure.selection import Selection, select_images
from facepipe.errors import ErasureLimitError
from facepipe.gallery import Gallery

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def fill(gallery: Gallery, first: int, count: int, source: str, time: datetime) -> None:
    """Add images of a source with a time of ingestion, as one file."""
    table = drawn(np.arange(count), Faces().draw(np.arange(count), first), first)
    columns = {"source": [source] * count, "ingested_at": [time] * count}
    for name, values in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    append(gallery, [table], f"20261101T000000-{first:06x}")


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    made = Gallery.create(str(tmp_path / "g"), CONTRACT)
    for day in range(4):
        fill(made, 100 * day, 5, "a" if day % 2 else "b", START + day * DAY)
    return Gallery(made.path)


class Clock:
    """What `read_time` and the disk say; both can be set."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.now = START
        self.store: datetime | None = None
        patch.setattr(selections, "read_time", lambda: self.now)
        patch.setattr(clocks, "read_time", lambda: self.now)
        patch.setattr(clocks, "read_store_time", lambda gallery: self.store or self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


# ------------------------------------------------------------------ shares


def test_rows_are_counted_by_source(gallery: Gallery) -> None:
    assert (count_rows(gallery), count_rows(gallery, "a"), count_rows(gallery, "none")) == (20, 10, 0)


def test_rows_of_files_with_several_sources_are_read(gallery: Gallery, tmp_path: Path) -> None:
    mixed = Gallery.create(str(tmp_path / "m"), CONTRACT)
    append(mixed, [gallery.to_arrow()], "20261101T000000-000000")
    mixed = Gallery(mixed.path)
    assert len(mixed.files()) == 1
    assert (count_rows(mixed), count_rows(mixed, "a"), count_rows(mixed, "none")) == (20, 10, 0)


@pytest.mark.parametrize(
    ("selection", "share"),
    [
        (Selection(uri="*"), 0.1),
        (Selection(older_than_days=3), 0.1),
        (Selection(missing=True), 0.1),
        (Selection(source="a", older_than_days=3), 0.1),
        (Selection(source="a"), 0.5),
        (Selection(identities=("x",)), 0.5),
        (Selection(ids=("1",), uri="*"), 0.5),
    ],
)
def test_rules_may_take_less_than_what_is_named(selection: Selection, share: float) -> None:
    assert choose_limit(selection).share == share


@pytest.mark.parametrize("selection", [Selection(identities=("x",)), Selection(images=("x",)), Selection(ids=("1",))])
def test_a_person_may_be_erased_who_is_most_of_a_small_gallery(selection: Selection, gallery: Gallery) -> None:
    """Up to a thousand images, and also if more of the person come in while a run goes on."""
    limit = choose_limit(selection)
    assert explain_excess(gallery, 20, 20, limit) == ""
    assert explain_excess(gallery, 1000, 20, limit) == ""
    assert "--yes-erase 1001" in explain_excess(gallery, 1001, 20, limit)
    selected = select_images(gallery, Selection(uri="*"))
    assert choose_total_share(gallery, selected, limit) > 1
    assert choose_limit(Selection(uri="*")).free == choose_limit(Selection(source="a")).free == 0


@given(rows=st.integers(0, 20), share=st.floats(0, 1), recent=st.none() | st.integers(0, 40), confirmed=st.booleans())
def test_a_share_is_never_exceeded_unless_the_number_is_confirmed(
    tmp_path_factory: pytest.TempPathFactory, rows: int, share: float, recent: int | None, confirmed: bool
) -> None:
    gallery = _twenty(tmp_path_factory)
    lately = None if recent is None else RecentErasures(recent, 20 + recent, min(1.0, 3 * share))
    limit = ErasureLimit(share, confirmed=(rows,) if confirmed else (21,), recent=lately)
    excess = explain_excess(gallery, rows, rows, limit)
    is_too_much = rows > share * 20 or (lately is not None and lately.rows + rows > lately.share * lately.total)
    assert bool(excess) == (is_too_much and rows > 0 and not confirmed)
    assert not excess or f"--yes-erase {rows}" in excess


_MADE: list[Gallery] = []


def _twenty(factory: pytest.TempPathFactory) -> Gallery:
    """A gallery of 20 rows, which all examples share."""
    if not _MADE:
        made = Gallery.create(str(factory.mktemp("twenty") / "g"), CONTRACT)
        fill(made, 0, 20, "a", START)
        _MADE.append(Gallery(made.path))
    return _MADE[0]


def test_the_message_says_what_to_type(gallery: Gallery) -> None:
    selected = select_images(gallery, Selection(uri="*"))
    with pytest.raises(ErasureLimitError, match=r"20 of the 20 rows of the gallery.* add --yes-erase 20$"):
        check_limit(gallery, selected, choose_limit(Selection(uri="*")))
    check_limit(gallery, selected, choose_limit(Selection(uri="*"), [20]))
    with pytest.raises(ErasureLimitError):
        check_limit(gallery, selected, choose_limit(Selection(uri="*"), [19, 21]))


# ------------------------------------------------------------------ clocks


@given(
    steps=st.lists(st.integers(0, 60 * 24), min_size=0, max_size=12),
    days=st.floats(0.01, 400),
    is_confirmed=st.booleans(),
)
def test_time_before_is_never_later_than_the_clock_says(steps: list[int], days: float, is_confirmed: bool) -> None:
    """And it is exactly that if facepipe was seen all the time, or another clock agrees."""
    seen = tuple(START + timedelta(hours=sum(steps[:n])) for n in range(len(steps) + 1))
    reading = ClockReading(seen[-1], seen[-1], seen, is_confirmed)
    by_clock = seen[-1] - timedelta(days=days)
    found = reading.find_time_before(days)
    assert found <= by_clock
    has_gap = any(timedelta(hours=step) > MAX_GAP for step in steps)
    assert bool(reading.find_longest_gap()) == (has_gap and not is_confirmed)
    if not has_gap or is_confirmed:
        assert found == by_clock


def test_a_gap_counts_as_a_week() -> None:
    seen = (START, START + DAY, START + 41 * DAY)
    reading = ClockReading(seen[-1], seen[-1], seen)
    assert reading.find_time_before(3) == START + 38 * DAY, "in the gap, in which no row is"
    assert reading.find_time_before(7.5) == START + DAY / 2
    assert reading.find_time_before(30) == START + DAY - 23 * DAY
    assert reading.find_longest_gap() == (START + DAY, START + 41 * DAY)


def select(gallery: Gallery, days: float, confirmed: tuple[int, ...] = (), **more: Any) -> tuple[int, str]:
    limit = ErasureLimit(1.0, confirmed=confirmed, **more)
    chosen = select_erasable(Gallery(gallery.path), Selection(older_than_days=days), limit)
    return chosen.images.images, "; ".join(chosen.doubts)


def test_a_clock_that_is_ahead_erases_nothing(gallery: Gallery, clock: Clock) -> None:
    clock.now = START + 43 * DAY
    images, doubt = select(gallery, 30)
    assert images == 0
    assert "20 images are older than 30 days by this machine's clock, which may be wrong: nothing was seen" in doubt
    assert "from 2026-11-04T00:00:00Z to 2026-12-14T00:00:00Z" in doubt
    assert doubt.endswith("add --yes-erase 20")
    assert select(gallery, 30, (19,))[0] == 0
    assert select(gallery, 30, (20,)) == (20, "")


def test_it_stays_so_in_the_nights_that_follow(gallery: Gallery, clock: Clock) -> None:
    """Rows and runs of the wrong nights are no reason to believe the clock."""
    for night in range(3):
        clock.now = START + (43 + night) * DAY
        fill(gallery, 1000 + 100 * night, 2, "a", clock.now)
        storage.replace(f"{gallery.path}/runs/{clock.now:%Y%m%dT%H%M%S}-000000.json", b"{}")
        assert select(gallery, 30)[0] == 0


def test_where_facepipe_was_seen_the_clock_is_believed(gallery: Gallery, clock: Clock) -> None:
    """By rows, or by records of runs alone: an inbox may stay empty for weeks."""
    for day in range(4, 40, 5):
        storage.replace(f"{gallery.path}/runs/{START + day * DAY:%Y%m%dT%H%M%S}-000000.json", b"{}")
    clock.now = START + 43 * DAY
    assert select(gallery, 41.5) == (10, "")
    assert select(gallery, 39.5) == (20, "")


def test_a_clock_that_is_behind_is_noticed(gallery: Gallery, clock: Clock) -> None:
    clock.now = START + 2 * DAY
    images, doubt = select(gallery, 1)
    assert (images, "but the gallery holds rows or runs of 2026-11-04T00:00:00Z" in doubt) == (5, True)
    assert select(gallery, 1, ignored_until=START + 3 * DAY) == (5, "")
    fill(gallery, 900, 1, "a", START + 5 * DAY)
    assert select(gallery, 1, ignored_until=START + 3 * DAY)[1]


def test_of_two_clocks_the_earlier_counts(gallery: Gallery, clock: Clock) -> None:
    """The disk of a server, or an object store, has a clock of its own."""
    clock.store = START + 4 * DAY
    for now in (START + 9 * DAY, START + 44 * DAY):
        clock.now = now
        images, doubt = select(gallery, 3.5)
        assert (images, "and that of the disk or store 2026-11-05T00:00:00Z" in doubt) == (5, True)
    clock.now = START + 4 * DAY + timedelta(minutes=50)
    assert select(gallery, 3.5) == (5, "")


def test_an_object_store_confirms_a_long_pause(bucket: Any, clock: Clock) -> None:
    """Its clock is not this machine's. A disk proves nothing."""
    made = Gallery.create("s3://faces/g", CONTRACT)
    fill(made, 0, 5, "a", START)
    clock.now = START + 60 * DAY
    assert select(made, 30) == (5, "")
    clock.store = START + 59 * DAY
    assert select(made, 30)[0] == 0


def test_a_dry_run_writes_nothing(gallery: Gallery, clock: Clock) -> None:
    before = sorted(Path(gallery.path).rglob("*"))
    read_clock(gallery, writes=False)
    assert sorted(Path(gallery.path).rglob("*")) == before


def test_the_time_of_the_disk(gallery: Gallery) -> None:
    found = clocks.read_store_time(gallery.path)
    assert found is not None
    assert abs(found - datetime.now(UTC)) < timedelta(hours=1)
    assert not list(Path(gallery.path, "runs").iterdir())
