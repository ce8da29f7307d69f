"""No night, and no few nights together, empty a gallery: wrong clocks, short retentions, sources that are not there."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as drawn
from helpers import run_facepipe

from facepipe.config import build
from facepipe.erasure import clock as clocks
from facepipe.erasure import selection as selections
from facepipe.gallery import Gallery
from facepipe.moves.settle import register_source, settle_source
from facepipe.observe import runs as records
from facepipe.sources import SourceConfig
from pipelines.nightly import NightConfirmation, NightSummary, run
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.guard import NightGuard, plan_erasures
from pipelines.nightly.pipeline import _Night

START = datetime(2026, 11, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class _AnyTime(type):
    """Makes real times instances of the fake class."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, datetime)


class World:
    """A gallery with one source, whose folder is empty, and a clock that can be set."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch):
        self.gallery = str(path / "g")
        self.inbox = path / "inbox"
        self.inbox.mkdir()
        self.now = START
        self.store: datetime | None = None
        self._count = 0
        self.runs = Path(self.gallery, "runs")
        self.runs.mkdir(parents=True)
        gallery = Gallery.create(self.gallery, CONTRACT)
        register_source(gallery, settle_source(gallery, SourceConfig(str(self.inbox), name="inbox")), "run", None)
        world = self

        class Now(datetime, metaclass=_AnyTime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return world.now

        for module in (selections, records):
            patch.setattr(module, "datetime", Now)
        patch.setattr(clocks, "read_store_time", lambda gallery: self.store or self.now)

    def add(self, count: int, *, age: float = 0.0, is_missing: bool = False) -> None:
        """Add images that were embedded some days ago."""
        first = 1000 * self._count
        self._count += 1
        table = drawn(np.arange(count), Faces().draw(np.arange(count), first), first)
        time = self.now - age * DAY
        values = {"source": "inbox", "ingested_at": time, "missing_since": time if is_missing else None}
        for name, value in values.items():
            at = table.schema.get_field_index(name)
            table = table.set_column(at, table.schema.field(at), pa.array([value] * count, table.schema.field(at).type))
        uris = pa.array([f"{self.inbox}{uri}" for uri in table["uri"].to_pylist()])
        table = table.set_column(table.schema.get_field_index("uri"), table.schema.field("uri"), uris)
        append(Gallery(self.gallery), [table], f"20261101T000000-{self._count:06x}")

    def configure(self, retention: float | None = 30, missing: str = "keep", **night: Any) -> NightlyConfig:
        source = {"uri": str(self.inbox), "name": "inbox", "missing": missing, "retention_days": retention}
        base = {"gallery": self.gallery, "source": [source], "night": {"dedup": False, "clusters": "no", **night}}
        return build(NightlyConfig, base)

    def night(self, config: NightlyConfig, *confirmed: int, **more: Any) -> NightSummary:
        """Run a night, and check that its dry run said what it did."""
        preview = run(config, dry_run=True)
        summary = run(config, confirmation=NightConfirmation(confirmed, **more))
        if not confirmed and not more:
            assert bool(preview.failures) == bool(summary.failures)
            for name in ("erase retention inbox", "erase missing inbox"):
                said = preview.steps.get(name, {"images": 0})["images"]
                assert said == summary.steps.get(name, {"images": 0})["images"]
        return summary

    def erase(self, config: NightlyConfig) -> list[str]:
        """Run the step of a night that erases, and return its failures."""
        (self.runs / f"{self.now:%Y%m%dT%H%M%S}-abcdef.json").write_text("{}")
        night = _Night(config, NightSummary(self.gallery), NightGuard(self.gallery), lambda line: None)
        night.erase_images()
        return night.summary.failures

    def see(self, days: int) -> None:
        """Have facepipe seen at work in all days before now."""
        for day in range(days):
            (self.runs / f"{self.now - day * DAY:%Y%m%dT%H%M%S}-abcdef.json").write_text("{}")

    @property
    def images(self) -> int:
        return Gallery(self.gallery).counts()["images"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


# ------------------------------------------------------------------ one night


def test_a_night_whose_clock_is_ahead_erases_nothing(world: World) -> None:
    """Before: 60 images became 0, exit 0, and none came back in a night with the right clock."""
    world.add(60)
    config = world.configure()
    assert world.night(config).failures == []
    for days in (40, 41, 42):
        world.now = START + days * DAY
        summary = world.night(config)
        assert len(summary.failures) == 1
        assert "60 images are older than 30 days by this machine's clock, which may be wrong" in summary.failures[0]
        assert world.images == 60
    world.now = START + DAY
    assert "rows or runs of 2026-12-13" in world.night(config).failures[0]
    assert world.images == 60


def test_a_long_pause_needs_the_number_once(world: World) -> None:
    world.add(60)
    config = world.configure(retention_at_most=1.0)
    world.now = START + 40 * DAY
    assert "add --yes-erase 60" in world.night(config).failures[0]
    assert world.night(config, 59).failures != []
    assert world.images == 60
    assert world.night(config, 60).failures == []
    assert world.images == 0
    world.add(3)
    world.now += DAY
    assert world.night(config).failures == []
    assert world.images == 3


@pytest.mark.parametrize("retention", [1, 3, 30, 365])
def test_a_retention_that_takes_everything_needs_the_number(world: World, retention: float) -> None:
    """A digit too few in `retention_days`; the gallery was seen every day."""
    world.add(20, age=retention + 2)
    world.see(int(retention) + 4)
    summary = world.night(world.configure(retention))
    assert world.images == 20
    assert "20 of the 20 rows of the source 'inbox', more than the" in summary.failures[0]
    assert summary.failures[0].endswith("add --yes-erase 20")
    assert world.night(world.configure(retention, retention_at_most=1.0)).failures == []
    assert world.images == 0


@pytest.mark.parametrize("retention", [1.0, 2.0, 5.0, 8.0, 14.0, 30.0])
def test_a_steady_gallery_is_never_stopped(world: World, retention: float) -> None:
    """Each day as many images come as go, and two nights of the nine do not run."""
    config = world.configure(retention)
    for day in range(int(retention) + 1):
        world.add(4, age=retention + 1 - day)
    world.see(int(retention) + 2)
    for day in range(9):
        world.now = START + day * DAY
        world.add(4)
        if day not in (5, 6) or retention == 1:
            assert world.erase(config) == [], day
    assert world.images <= 4 * (retention + 2)


def test_missing_images_of_many_nights_are_not_erased_in_one(world: World) -> None:
    """They were marked by nights whose policy was `mark`, each below the limit."""
    world.add(10)
    world.add(10, is_missing=True)
    summary = world.night(world.configure(None, "erase"))
    assert "10 of the 20 rows of the source 'inbox', more than the 10% that night.missing_at_most" in next(
        line for line in summary.failures if "missing inbox" in line
    )
    assert world.images == 20
    world.night(world.configure(None, "erase"), 10)
    assert world.images == 10


# ------------------------------------------------------------------ several nights


def test_missing_images_are_not_erased_bit_by_bit(world: World) -> None:
    """A source that loses a little every night, each time less than the limit."""
    world.add(200)
    config = world.configure(None, "erase")
    nights = 0
    for night in range(10):
        world.now = START + night * DAY
        world.add(18, is_missing=True)
        failures = world.erase(config)
        if failures:
            assert "that were erased lately are more than 30%" in failures[0]
            break
        nights += 1
    assert nights == 3


def test_a_clock_that_gains_days_every_night_is_stopped(world: World) -> None:
    """Five days a night: no gap is longer than a week, and no night erases more than a tenth."""
    for day in range(30):
        world.add(4, age=30 - day)
    config = world.configure(40)
    for night in range(12):
        world.now = START + 5 * night * DAY
        world.erase(config)
    assert world.images >= 60


def test_old_erasures_are_forgotten(world: World) -> None:
    world.add(100)
    (planned,) = plan_erasures(world.configure(None, "erase"), Gallery(world.gallery))
    for night in range(20):
        world.now = START + night * DAY
        NightGuard(world.gallery).note_erasure(planned, 5)
    ledger = json.loads(Path(world.gallery, "runs", "nights.json").read_text())
    assert len(ledger["erasures"]) == 7
    recent = NightGuard(world.gallery).get_limit(planned).recent
    assert recent is not None
    assert (recent.rows, recent.total) == (35, 105)
    world.now += 31 * DAY
    assert NightGuard(world.gallery).get_limit(planned).recent is None
    assert "inbox" not in json.dumps(ledger)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"erasures": [{"key": 1}]}', b"\xff"])
def test_a_damaged_ledger_stops_no_night(world: World, data: bytes) -> None:
    world.add(20)
    path = Path(world.gallery, "runs", "nights.json")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    assert world.night(world.configure()).failures == []


# ------------------------------------------------------------------ the clock at the beginning of a night


def test_with_a_clock_that_is_behind_no_image_gets_a_wrong_time(world: World) -> None:
    """Images of such a night would be taken for a year old by the next one, and erased."""
    world.add(20)
    (world.inbox / "photo.png").write_bytes(b"not read")
    world.now = START - 365 * DAY
    summary = world.night(world.configure())
    assert "embed inbox" not in summary.steps
    assert summary.failures[0].startswith("no image with a retention was embedded or erased: this machine's clock says")
    assert summary.failures[0].endswith("if it is right, add --yes-clock 2025-11-01")
    # Without a retention it does not matter when an image was embedded.
    world.inbox.joinpath("photo.png").unlink()
    assert world.night(world.configure(None)).failures == []


def test_after_nights_ahead_the_date_is_confirmed_once(world: World) -> None:
    world.add(20)
    world.now = START + 6 * DAY
    world.add(1)
    world.now = START + DAY
    config = world.configure()
    day = world.now.date()
    assert "--yes-clock 2026-11-02" in world.night(config).failures[0]
    assert world.night(config, clock_date=day - DAY).failures != []
    assert world.night(config, clock_date=day).failures == []
    world.now += DAY
    assert world.night(config).failures == []
    world.add(1, age=-20)
    assert "rows or runs of 2026-11-23" in world.night(config).failures[0]


def test_a_disk_with_another_time_stops_the_retention_only(world: World) -> None:
    world.add(20, age=20)
    world.add(5, age=29.5)
    world.store = START
    world.now = START + 2 * DAY
    summary = world.night(world.configure())
    assert "and that of the disk or store 2026-11-01" in summary.failures[0]
    assert (world.images, "index" in summary.steps) == (25, True)


# ------------------------------------------------------------------ the commands


def test_the_command_says_what_to_type_and_takes_it(world: World, tmp_path: Path) -> None:
    world.add(60, age=40)
    world.see(41)
    config = tmp_path / "night.toml"
    config.write_text(
        f'gallery = "{world.gallery}"\n[[source]]\nuri = "{world.inbox}"\nname = "inbox"\nmissing = "keep"\n'
        'retention_days = 30\n[night]\ndedup = false\nclusters = "no"\n'
    )
    code, _, err = run_facepipe("nightly", config)
    assert (code, "add --yes-erase 60" in err) == (1, True)
    assert world.images == 60
    assert run_facepipe("nightly", config, "--yes-erase", "60")[0] == 0
    assert world.images == 0


@pytest.mark.parametrize(
    "words",
    [("--uri", "*"), ("--older-than", "30"), ("--missing",), ("--source", "inbox"), ("--uri", "*/synthetic/*1*")],
)
def test_erase_asks_for_the_number(world: World, words: tuple[str, ...]) -> None:
    world.add(60, age=40, is_missing=True)
    world.see(41)
    code, out, _ = run_facepipe("erase", world.gallery, *words, "--dry-run", "--json")
    images = json.loads(out)["images"]
    assert code == 0
    assert f"--yes-erase {images}" in json.loads(out)["refusal"]
    code, _, err = run_facepipe("erase", world.gallery, *words)
    assert (code, f"{images} images would be erased" in err, f"add --yes-erase {images}" in err) == (1, True, True)
    assert run_facepipe("erase", world.gallery, *words, "--yes-erase", str(images + 1))[0] == 1
    assert world.images == 60
    assert not list(Path(world.gallery, "erased").glob("*.pending"))
    assert run_facepipe("erase", world.gallery, *words, "--yes-erase", str(images))[0] == 0
    assert world.images == 60 - images


def test_erase_asks_where_the_clock_may_be_wrong(world: World) -> None:
    world.add(60)
    world.now = START + 40 * DAY
    code, _, err = run_facepipe("erase", world.gallery, "--older-than", "30")
    assert (code, "which may be wrong" in err, world.images) == (1, True, 60)
    assert run_facepipe("erase", world.gallery, "--older-than", "30", "--yes-erase", "60")[0] == 0
    assert world.images == 0
