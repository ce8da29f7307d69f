"""Nights: after any change of the sources, the gallery equals one made from scratch."""

import io
import json
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows, same_faces

from facepipe import storage
from facepipe.config import build
from facepipe.erasure import clock as erasure_clock
from facepipe.erasure import selection
from facepipe.errors import ConfigError, GalleryBusyError, SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.commits import missing, parts
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.moves import moved_images
from facepipe.observe import runs
from facepipe.storage.lease import hold_lease
from facepipe.storage.store import open_store
from pipelines import erase, index
from pipelines.embed import pipeline as embed_pipeline
from pipelines.nightly import pipeline as nightly
from pipelines.nightly import run
from pipelines.nightly.config import NightlyConfig
from pipelines.nightly.pipeline import NightSummary

Tree = dict[str, Any]


@cache
def encode_picture(n: int) -> bytes:
    """The bytes of a PNG: another one for each n, with n % 3 faces."""
    return cv2.imencode(".png", draw(n))[1].tobytes()


@dataclass(frozen=True)
class GalleryImage:
    """An image that the gallery should hold.

    Attributes:
        source: name of its source.
        picture: number of the picture, for `encode_picture`.
        day: day on which it was embedded.
        missing: whether its source no longer lists it.
    """

    source: str
    picture: int
    day: int
    missing: bool = False


@dataclass
class World:
    """Three sources, and what a gallery of them should hold. `Clock` counts the days.

    `watched` is a folder whose missing images are marked. `shards` is a tar whose missing images are erased. `inbox` is a
    folder whose missing images are kept; all its images are erased after some days.
    """

    root: Path
    listed: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    images: dict[str, GalleryImage] = field(default_factory=dict)
    erased_uris: set[str] = field(default_factory=set)
    erased_pictures: set[int] = field(default_factory=set)
    retention: float = 3.5
    policies: dict[str, str] = field(default_factory=lambda: {"watched": "mark", "shards": "erase", "inbox": "keep"})

    def get_uri(self, source: str, name: str) -> str:
        return f"{self.root}/shards.tar#{name}" if source == "shards" else f"{self.root}/{source}/{name}"

    def put(self, source: str, name: str, n: int) -> None:
        self.listed[source][name] = n
        if source != "shards":
            path = self.root / source / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(encode_picture(n))
        else:
            self._pack()

    def remove(self, source: str, name: str) -> None:
        del self.listed[source][name]
        if source != "shards":
            (self.root / source / name).unlink()
        else:
            self._pack()

    def _pack(self) -> None:
        with tarfile.open(self.root / "shards.tar", "w") as shard:
            for name, n in sorted(self.listed["shards"].items()):
                info = tarfile.TarInfo(name)
                info.size = len(encode_picture(n))
                shard.addfile(info, io.BytesIO(encode_picture(n)))

    def list_sources(self) -> list[Tree]:
        return [
            {"name": "watched", "uri": str(self.root / "watched"), "missing": self.policies["watched"]},
            {"name": "shards", "uri": str(self.root / "shards.tar"), "missing": self.policies["shards"]},
            {
                "name": "inbox",
                "uri": str(self.root / "inbox"),
                "missing": self.policies["inbox"],
                "retention_days": self.retention,
            },
        ]

    def apply_night(self, day: int) -> set[str]:
        """Apply a night to the expected images, and return the uris that the night embeds."""
        new = set()
        for source, names in self.listed.items():
            moved = self._find_moved(source)
            for name, n in names.items():
                uri = self.get_uri(source, name)
                old = self.images.get(uri)
                if uri in self.erased_uris:
                    continue
                if uri in moved:
                    self.images[uri] = moved[uri]
                elif old and old.picture == n:
                    self.images[uri] = replace(old, missing=False)
                elif n in self.erased_pictures:
                    self.images.pop(uri, None)
                else:
                    self.images[uri] = GalleryImage(source, n, day)
                    new.add(uri)
        listed = {self.get_uri(source, name) for source, names in self.listed.items() for name in names}
        for uri, image in list(self.images.items()):
            policy = self.policies[image.source]
            if image.source == "inbox" and image.day < day - self.retention:
                self.erased_uris.add(uri)
                del self.images[uri]
            elif uri not in listed and policy != "keep":
                self.images[uri] = replace(image, missing=True)
                if policy == "erase":
                    del self.images[uri]
        return new

    def _find_moved(self, source: str) -> dict[str, GalleryImage]:
        """Find the images that a source lists under a new uri, and take them away from the uris that gave them up."""
        listed = {self.get_uri(source, name): n for name, n in self.listed[source].items()}
        given_up = {
            uri: image
            for uri, image in self.images.items()
            if image.source == source
            and listed.get(uri) != image.picture
            and not (uri in listed and listed[uri] in self.erased_pictures)
        }
        moved = {}
        for uri, n in sorted(listed.items()):
            old = self.images.get(uri)
            holders = sorted(other for other, image in given_up.items() if image.picture == n)
            is_out = uri in self.erased_uris or n in self.erased_pictures
            if holders and not is_out and not (old and old.picture == n):
                moved[uri] = replace(given_up.pop(holders[0]), missing=False)
                if holders[0] not in listed:
                    del self.images[holders[0]]
        return moved

    def erase_image(self, uri: str) -> None:
        """Apply an erasure: the image and its exact copies never come back."""
        n = self.images[uri].picture
        self.erased_pictures.add(n)
        for copy in [copy for copy, image in self.images.items() if image.picture == n]:
            self.erased_uris.add(copy)
            del self.images[copy]


class _AnyTime(type):
    """Makes real times instances of the fake class."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, datetime)


class Clock:
    """A clock whose days pass only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.day = 0
        clock = self

        class Now(datetime, metaclass=_AnyTime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime.now(tz) + timedelta(days=clock.day)

        for module in (parts, missing, moved_images, selection, embed_pipeline):
            monkeypatch.setattr(module, "datetime", Now)
        monkeypatch.setattr(erasure_clock, "read_store_time", lambda gallery: Now.now(UTC))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def config(fakes: Tree) -> Callable[..., NightlyConfig]:
    def make_config(world: World, gallery: str | Path, **layers: Any) -> NightlyConfig:
        base = {
            "gallery": str(gallery),
            "source": world.list_sources(),
            "graph": {"threshold": 0.3},
            "night": {"missing_at_most": 0.9, "retention_at_most": 1.0, "clusters": "make"},
            "compact": {"fewest": 5},
        }
        return build(NightlyConfig, fakes, base, layers)

    return make_config


def change_sources(world: World, rng: np.random.Generator, count: int) -> None:
    """Change the sources at random: add, copy, change, touch, remove and bring back images."""
    for _ in range(count):
        source = str(rng.choice(list(world.policies)))
        names = sorted(world.listed[source])
        what = rng.choice(["add", "add", "copy", "change", "touch", "remove", "return"])
        name = str(rng.choice(names)) if names else ""
        if what == "add" or not names:
            world.put(source, f"{rng.integers(10**6):06d}.png", int(rng.integers(400)))
        elif what == "copy":
            other = str(rng.choice([s for s in world.listed if world.listed[s]]))
            n = world.listed[other][str(rng.choice(sorted(world.listed[other])))]
            world.put(source, f"{rng.integers(10**6):06d}.png", n)
        elif what == "change":
            world.put(source, name, int(rng.integers(400)))
        elif what == "touch":
            world.put(source, name, world.listed[source][name])
        elif what == "remove" and len(names) > 3:
            world.remove(source, name)
        elif what == "return":
            gone = [u for u, i in sorted(world.images.items()) if i.source == source and i.missing]
            if gone:
                uri = str(rng.choice(gone))
                world.put(source, Path(uri).name, world.images[uri].picture)


def check_gallery(world: World, gallery: str, fakes: Tree, scratch: Path, summary: NightSummary) -> None:
    """Compare rows, marks, answers and clusters with the expected ones, and with a gallery made from scratch."""
    images = {row["uri"]: row for row in rows(gallery) if row["face_index"] in (None, 0) and row["status"] != "erased"}
    assert images.keys() == world.images.keys()
    for uri, image in world.images.items():
        assert (images[uri]["source"], images[uri]["missing_since"] is not None) == (image.source, image.missing)
    mine = [row for row in rows(gallery) if row["status"] != "erased"]
    folder = scratch / "images"
    folder.mkdir(parents=True)
    for n, image in enumerate(world.images.values()):
        (folder / f"{n:04d}.png").write_bytes(encode_picture(image.picture))
    embed(folder, scratch / "g", fakes)
    theirs = rows(scratch / "g")
    same_faces(mine, theirs)
    index.run(index.IndexConfig(), str(scratch / "g"))
    check_same_answers(gallery, str(scratch / "g"))
    assert verify_gallery(Gallery(gallery)).problems == []
    assert verify_index(Gallery(gallery)) == []
    clustered = read_report(gallery, "cluster", "faces")["face_id"].to_pylist()
    assert sorted(clustered) == sorted(row["face_id"] for row in mine if row["face_id"] is not None)
    assert summary.failures == []


def read_report(gallery: str, name: str, table: str) -> Any:
    """Read a table of a report, of a local or a remote gallery."""
    store = open_store(gallery, f"reports/{name}")
    store.pull()
    return pq.read_table(store.local_path(f"{table}.parquet"))


def check_same_answers(gallery: str, other: str) -> None:
    """Check that both galleries answer the same for every face."""
    found = []
    _, vectors = Gallery(other).vectors()
    for path in (gallery, other):
        opened = Index(path)
        hits = opened.search(vectors, opened.live)
        names = {row["face_id"]: f"{row['image_id']} {row['face_index']}" for row in rows(path)}
        found.append((np.vectorize(names.__getitem__, otypes=[object])(hits.ids), hits.distances))
    (left, near), (right, same) = found
    np.testing.assert_allclose(near, same, atol=1e-4)
    for a, b, x, y in zip(left, right, near, same, strict=True):
        assert sorted(a) == sorted(b)
        far = dict(zip(b, y, strict=True))
        assert max(abs(far[name] - distance) for name, distance in zip(a, x, strict=True)) < 1e-4


def check_copies(world: World, gallery: str, new: set[str]) -> None:
    """Check that the report holds the new images, and groups those with the same bytes."""
    group = {row["uri"]: row["group"] for row in read_report(gallery, "dedup-new", "decisions").to_pylist()}
    assert new & world.images.keys() <= group.keys()
    assert group.keys() <= world.images.keys()
    for uri in new & world.images.keys():
        copies = [u for u, image in world.images.items() if image.picture == world.images[uri].picture]
        assert len(copies) == 1 or {group[copy] for copy in copies} == {group[uri]} != {None}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "nights"), [(0, 10), (1, 4)])
def test_nights_equal_a_gallery_from_scratch(
    seed: int, nights: int, clock: Clock, config: Callable[..., NightlyConfig], fakes: Tree, tmp_path: Path
) -> None:
    """Compare each night with a gallery made from scratch, and with its dry run."""
    rng, world, g = np.random.default_rng(seed), World(tmp_path / "in"), str(tmp_path / "g")
    for n in range(36):
        world.put(("watched", "shards", "inbox")[n % 3], f"{n:06d}.png", n)
    for day in range(nights):
        clock.day = day
        change_sources(world, rng, int(rng.integers(0, 8)))
        if day % 4 == 3:
            erased_uri = str(rng.choice(sorted(world.images)))
            erase.run(selection.Selection(images=(erased_uri,)), g)
            world.erase_image(erased_uri)
        # Every other night all old files go at once, so that the next one cannot look at what was.
        chosen = config(world, g, compact={"keep_hours": 24.0 * (day % 2)})
        preview = run(chosen, dry_run=True)
        summary = run(chosen)
        new = world.apply_night(day)
        check_gallery(world, g, fakes, tmp_path / f"scratch{day}", summary)
        if new:
            check_copies(world, g, new)
        if day:
            assert summary.steps["dedup"]["new"] == len(new)
        check_preview(preview, summary)
        check_rerun(chosen)


def check_preview(preview: NightSummary, summary: NightSummary) -> None:
    """Check that a night did what its dry run said."""
    for name in ("watched", "shards", "inbox"):
        said, done = preview.steps[f"embed {name}"], summary.steps[f"embed {name}"]
        assert said["new"] + said["changed"] == done["images"]
        counts = ("skipped", "repeated", "erased", "ignored", "missing")
        assert [said.get(count, 0) for count in counts] == [done[count] for count in counts]
    for reason, name in (("retention", "inbox"), ("missing", "shards")):
        said = preview.steps.get(f"erase {reason} {name}", {"images": 0, "faces": 0})
        done = summary.steps.get(f"erase {reason} {name}", {"images": 0, "faces": 0})
        assert (said["images"], said["faces"]) == (done["images"], done["faces"])


def check_rerun(chosen: NightlyConfig) -> None:
    """Check that the same night again does nothing."""
    before = Gallery(chosen.gallery).version
    summary = run(chosen)
    assert summary.version == Gallery(chosen.gallery).version == before
    assert (summary.images, summary.failed, summary.failures) == (0, 0, [])
    assert (summary.steps["index"]["action"], summary.steps["index"]["added"]) == ("unchanged", 0)
    assert [summary.steps["assign"][name] for name in ("new", "gone", "clusters")] == [0, 0, 0]
    assert (summary.steps["dedup"]["new"], summary.steps["compact"]["joined"]) == (0, 0)
    assert not [step for step in summary.steps if step.startswith("erase")]


# ------------------------------------------------------------------------------------------------------------ properties


def make_world(root: Path, count: int = 18) -> World:
    world = World(root)
    for n in range(count):
        world.put(("watched", "shards", "inbox")[n % 3], f"{n:06d}.png", n)
    return world


def read_state(gallery: str) -> tuple[list[Tree], list[list[int]]]:
    """Read the rows without their times, and the faces of each cluster."""
    found = rows(gallery, ("ingested_at", "missing_since"))
    table = read_report(gallery, "cluster", "faces")
    together = defaultdict(list)
    for face, cluster in zip(table["face_id"].to_pylist(), table["cluster"].to_pylist(), strict=True):
        together[cluster].append(face)
    return found, sorted(sorted(faces) for faces in together.values())


STEPS = [
    *("embed.run", "embed.run", "index.run", "cluster_assign.run", "erase.run", "erase.run", "dedup_new.run"),
    "compact.run",
]


@pytest.mark.slow
def test_a_night_resumes_after_a_kill_at_any_step(
    clock: Clock, config: Callable[..., NightlyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fakes: Tree
) -> None:
    """The next night first finishes an interrupted erasure."""
    world, base = make_world(tmp_path / "in"), str(tmp_path / "base")
    run(config(world, base))
    world.apply_night(0)
    clock.day = 5  # everything in the inbox is past its time
    world.put("watched", "900000.png", 4)
    world.put("inbox", "900001.png", 301)
    world.put("watched", "000003.png", 302)
    world.remove("shards", "000001.png")
    world.remove("watched", "000000.png")
    world.apply_night(5)
    wanted = str(tmp_path / "wanted")
    shutil.copytree(base, wanted)
    summary = run(config(world, wanted))
    assert {"erase retention inbox", "erase missing shards"} <= set(summary.steps)
    check_gallery(world, wanted, fakes, tmp_path / "scratch", summary)
    for n, step in enumerate([*STEPS, "erase.steps.vectors.remove_vectors", "erase.steps.scrub_reports"]):
        killed = str(tmp_path / f"killed{n}")
        shutil.copytree(base, killed)
        with monkeypatch.context() as patch:
            patch.setattr(f"pipelines.nightly.pipeline.{step}", make_failing_step(STEPS, n, step))
            with pytest.raises(_KilledError):
                run(config(world, killed))
        rerun = run(config(world, killed))
        assert rerun.failures == []
        assert read_state(killed) == read_state(wanted), step
        check_same_answers(killed, wanted)
        assert verify_index(Gallery(killed)) == []


class _KilledError(BaseException):
    """No step may catch it."""


def make_failing_step(steps: list[str], n: int, step: str) -> Callable[..., Any]:
    """Return a step that does its work and then fails.

    Args:
        steps: the steps of a night in order.
        n: which of them fails; a step that runs twice fails at its first or second call.
        step: its name in the pipeline's module.
    """
    module, name = step.rsplit(".", 1)
    target: Any = nightly
    for part in module.split("."):
        target = getattr(target, part)
    real, left = getattr(target, name), [steps[:n].count(step)]

    def run_and_die(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        if left[0]:
            left[0] -= 1
            return found
        raise _KilledError

    return run_and_die


@pytest.mark.slow
def test_one_night_equals_three_nights(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    """Rows and answers of three inline nights equal those of one night by two local workers.

    Clusters may differ, because later faces are assigned and never join two clusters.
    """
    world, slow, fast = make_world(tmp_path / "in", 6), str(tmp_path / "slow"), str(tmp_path / "fast")
    for first, last in ((6, 6), (6, 20), (20, 30)):
        for n in range(first, last):
            world.put(("watched", "shards", "inbox")[n % 3], f"{n:06d}.png", n)
        run(config(world, slow))
    summary = run(config(world, fast, run={"runner": "local", "workers": 2, "block_smallest": 3}))
    assert summary.images == 30
    assert rows(slow) == rows(fast)
    check_same_answers(slow, fast)


def read_files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_a_dry_run_writes_nothing(clock: Clock, config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = make_world(tmp_path / "in"), tmp_path / "g"
    assert run(config(world, g), dry_run=True).steps["embed watched"]["new"] == 6
    assert not g.exists()
    run(config(world, g))
    before = read_files(g)
    clock.day = 5
    world.remove("shards", "000001.png")
    summary = run(config(world, g), dry_run=True)
    assert summary.steps["erase retention inbox"]["images"] == 6
    assert summary.steps["erase missing shards"] == {"images": 1, "faces": 1}
    assert read_files(g) == before


@pytest.mark.slow
def test_nights_in_an_object_store(
    bucket: Any, clock: Clock, config: Callable[..., NightlyConfig], fakes: Tree, tmp_path: Path
) -> None:
    """Run each night without a cache, as on another machine of a cluster."""
    world, g = make_world(tmp_path / "in", 12), "s3://faces/gallery"
    for day in range(2):
        clock.day = 4 * day  # the inbox is past its time on the second
        if day:
            bucket.delete_object(Bucket="faces", Key=f"in/{day}.png")
            world.put("watched", f"9{day}.png", 100 + day)
            world.remove("shards", f"{3 * day + 1:06d}.png")
        for n in range(day + 1, day + 6):
            bucket.put_object(Bucket="faces", Key=f"in/{n}.png", Body=encode_picture(200 + n))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        chosen = config(world, g)
        stored = build(NightlyConfig, {"source": [{"name": "stored", "uri": "s3://faces/in/", "missing": "erase"}]})
        chosen = replace(chosen, source=(*chosen.source, *stored.source))
        preview = run(chosen, dry_run=True)
        summary = run(chosen)
        new = world.apply_night(4 * day)
        uris = {f"s3://faces/in/{n}.png": 200 + n for n in range(day + 1, day + 6)}
        both = World(world.root, images={**world.images, **{u: GalleryImage("stored", n, 0) for u, n in uris.items()}})
        check_gallery(both, g, fakes, tmp_path / f"scratch{day}", summary)
        check_copies(both, g, new | ({f"s3://faces/in/{day + 5}.png"} if day else uris.keys()))
        check_preview(preview, summary)
        if day:
            assert "erase retention inbox" in summary.steps
            check_rerun(chosen)


# -------------------------------------------------------------------------------------------------- policies and guards


@pytest.mark.parametrize("policy", ["keep", "mark", "erase"])
def test_images_that_a_source_no_longer_lists(
    policy: str, config: Callable[..., NightlyConfig], tmp_path: Path
) -> None:
    world, g = make_world(tmp_path / "in"), str(tmp_path / "g")
    world.policies["watched"] = policy
    run(config(world, g))
    world.remove("watched", "000000.png")
    world.remove("watched", "000003.png")
    guarded = config(world, g, night={"missing_at_most": 0.3})
    summary = run(guarded)
    left = {Path(r["uri"]).name: r["missing_since"] for r in rows(g) if r["source"] == "watched"}
    gone = {"000000.png", "000003.png"}
    if policy == "keep":
        assert (summary.failures, len(left), set(left.values())) == ([], 6, {None})
    else:
        assert "2 of 6 images are missing at once" in summary.failures[0]
        assert (len(left), set(left.values())) == (6, {None})
        assert run(guarded, dry_run=True).failures[0].startswith("watched: 2 of 6 images")
    assert run(config(world, g)).failures == []
    left = {Path(r["uri"]).name: r["missing_since"] for r in rows(g) if r["source"] == "watched"}
    assert {name for name, since in left.items() if since} == (gone if policy == "mark" else set())
    assert left.keys() & gone == (set() if policy == "erase" else gone)
    world.put("watched", "000000.png", 0)
    run(config(world, g))
    left = {Path(r["uri"]).name: r["missing_since"] for r in rows(g) if r["source"] == "watched"}
    assert left["000000.png"] is None, "what was missing may return"


@pytest.mark.parametrize("how", ["emptied", "unmounted"])
def test_a_night_continues_without_a_missing_source(
    how: str, config: Callable[..., NightlyConfig], tmp_path: Path
) -> None:
    world, g = make_world(tmp_path / "in"), str(tmp_path / "g")
    world.policies["watched"] = "erase"
    run(config(world, g))
    before = [row for row in rows(g) if row["source"] == "watched"]
    shutil.rmtree(tmp_path / "in" / "watched")
    if how == "emptied":
        (tmp_path / "in" / "watched").mkdir()
    world.put("shards", "900000.png", 100)
    for dry_run in (True, False):
        summary = run(config(world, g), dry_run=dry_run)
        assert len(summary.failures) == 1
        assert summary.failures[0].startswith("watched: no ")
        assert not any(
            step.startswith("erase") and "watched" in step and found["images"] for step, found in summary.steps.items()
        )
    assert summary.steps["index"]["added"] == 1, "of the new image in the other source"
    assert [row for row in rows(g) if row["source"] == "watched"] == before


def test_an_empty_inbox_is_no_failure(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = make_world(tmp_path / "in"), str(tmp_path / "g")
    run(config(world, g))
    for name in list(world.listed["inbox"]):
        world.remove("inbox", name)
    summary = run(config(world, g))
    assert summary.failures == []
    assert "no image in" in summary.problems[0]
    assert run(config(world, g), dry_run=True).failures == []


def test_no_gallery_without_any_image(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = World(tmp_path / "in"), tmp_path / "g"
    with pytest.raises(SourceError, match=r"watched: no such file or folder.*; shards: .*; inbox: "):
        run(config(world, g))
    assert not (g / "faces").exists()


def test_a_second_night_is_refused(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = make_world(tmp_path / "in", 3), str(tmp_path / "g")
    run(config(world, g))
    with hold_lease(storage.join(g, "runs"), "nightly job"), pytest.raises(GalleryBusyError, match="nightly job"):
        run(config(world, g))


def test_clusters_are_made_only_if_configured(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = make_world(tmp_path / "in"), tmp_path / "g"
    summary = run(config(world, g, night={"clusters": "assign"}))
    assert "facepipe cluster" in summary.problems[0]
    assert {record.job for record in runs.read_newest(str(g), 100) if record.exit_code} == set(), (
        "no part of it has failed"
    )
    assert not (g / "reports" / "cluster").exists()
    assert run(config(world, g, night={"clusters": "no"})).problems == []
    # A model that does not say from where on two are two persons, and too few faces to find it.
    summary = run(config(world, g, graph={"threshold": None}))
    assert summary.problems[0].startswith("no clusters were made")
    assert "cluster" in run(config(world, g)).steps


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"gallery": ""}, "names no gallery"),
        ({"source": []}, "names no source"),
        ({"source": [{"name": "a"}]}, "names no source"),
        ({"source": [{"uri": "{}", "name": "a"}, {"uri": "{}", "name": "a"}]}, "two sources have the name 'a'"),
        ({"source": [{"uri": "{}", "missing": "forget"}]}, "missing"),
        ({"source": [{"uri": "{}", "retention_days": 0}]}, "retention_days"),
        ({"source": [{"url": "{}"}]}, r"did you mean source\[1\].uri"),
        ({"night": {"max_fail": 0.1}}, "did you mean night.max_failed"),
        ({"nigth": {}}, "did you mean night"),
    ],
)
def test_bad_configs(layer: Tree, message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    base = {"gallery": str(tmp_path / "g"), "source": [{"uri": str(tmp_path / "in")}]}
    tree_ = json.loads(
        json.dumps(layer).replace("{}", str(tmp_path / "in")) if "source" in layer else json.dumps(layer)
    )
    with pytest.raises(ConfigError, match=message):
        run(build(NightlyConfig, base, tree_))
    assert not (tmp_path / "g").exists()


def test_names_of_sources_stay_out_of_the_records(config: Callable[..., NightlyConfig], tmp_path: Path) -> None:
    world, g = make_world(tmp_path / "in"), tmp_path / "g"
    summary = run(config(world, g))
    assert set(summary.seconds) == {"embed", "index", "assign", "erase", "dedup", "compact"}
    records = runs.read_newest(str(g), 100)
    (night,) = (record for record in records if record.job == "nightly")
    assert (night.state, night.counters["images"], set(night.seconds)) == ("done", 18, set(summary.seconds))
    assert {record.job for record in records if record.parent == night.run} >= {
        "embed",
        "index",
        "dedup_new",
        "compact",
    }
    for path in (g / "runs").rglob("*.json"):
        assert not [name for name in ("watched", "shards.", "inbox", str(tmp_path)) if name in path.read_text()]
