"""A run that sleeps at any step, and wakes when another run has taken the gallery over, harms nothing of what that did.

A process is really stopped (SIGSTOP) before a chosen step: a change of a file, a listing, a check of the lease. The
sleeper's clock shows the pause in half of the trials: that of a virtual machine that was paused does not.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import draw
from helpers import embed, rows
from pauses import Sleepers, open_sleepers

from facepipe import storage
from facepipe.config import build
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.storage import conditional
from facepipe.storage import lease as leases
from facepipe.storage.lease import hold_lease
from pipelines import compact, erase, index
from pipelines.dedup import pipeline as dedup

FAKES: dict[str, dict[str, Any]] = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline", "block_smallest": 4, "block_largest": 8, "commit_seconds": 0.0},
}
INLINE = [f"--set={section}.{name}={value}" for section, keys in FAKES.items() for name, value in keys.items()]
COMMANDS: dict[str, list[str]] = {
    "erase": ["erase", "GALLERY", "--identity", "person1"],
    "embed": ["embed", "LATE", "GALLERY", *INLINE],
    "index": ["index", "GALLERY", "--retrain", "--set", "index.keep_hours=0"],
    "compact": ["compact", "GALLERY", "--all", "--set", "compact.keep_hours=0"],
    "dedup": ["dedup", "GALLERY"],
}
# How many steps of each command are tried, on a disk and in a store.
COUNTS = {
    ("erase", "disk"): 12,
    ("embed", "disk"): 3,
    ("index", "disk"): 6,
    ("compact", "disk"): 3,
    ("dedup", "disk"): 6,
    ("erase", "s3"): 6,
    ("index", "s3"): 3,
    ("dedup", "s3"): 3,
}
TRIALS = [(name, n, count, where) for (name, where), count in COUNTS.items() for n in range(count)]
# The moments at which runs did harm before: between a check and what it was to protect.
MOMENTS = [
    ("erase", "facepipe.erasure.steps.claim_unreferenced", 1, "disk"),
    pytest.param("erase", "facepipe.erasure.steps.claim_unreferenced", 1, "s3", marks=pytest.mark.slow),
    pytest.param("erase", "facepipe.storage.delete_many", 1, "disk", marks=pytest.mark.slow),
    ("erase", "facepipe.erasure.steps.delete_history", 1, "disk"),
    pytest.param("erase", "facepipe.erasure.steps.pending.delete_pending", 1, "disk", marks=pytest.mark.slow),
    pytest.param("erase", "facepipe.erasure.steps.scrub_reports", 1, "disk", marks=pytest.mark.slow),
    ("erase", "facepipe.erasure.reports.swap_folders", 1, "disk"),
    pytest.param("erase", "facepipe.storage.store.ObjectStore._upload_if", 1, "s3", marks=pytest.mark.slow),
    ("index", "facepipe.index.manifest.sweep", 2, "disk"),
    pytest.param("index", "facepipe.index.manifest.sweep", 2, "s3", marks=pytest.mark.slow),
    pytest.param("index", "facepipe.index.manifest._replace", 1, "disk", marks=pytest.mark.slow),
    pytest.param("index", "facepipe.storage.store.LocalStore.delete_owned", 1, "disk", marks=pytest.mark.slow),
    ("compact", "pipelines.compact.claim_unreferenced", 1, "disk"),
    pytest.param("compact", "facepipe.storage.delete_many", 1, "disk", marks=pytest.mark.slow),
    ("dedup", "pipelines.runtime.workspace.swap_folders", 1, "disk"),
    pytest.param("dedup", "pipelines.graph.swap_folders", 1, "disk", marks=pytest.mark.slow),
    pytest.param("dedup", "facepipe.storage.store.ObjectStore.push", 1, "s3", marks=pytest.mark.slow),
    pytest.param("dedup", "facepipe.storage.store.ObjectStore._upload_if", 3, "s3", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it watched for no time whether a stopped process gives a sign of life."""
    monkeypatch.setattr(leases, "_watch", lambda path, holder: True)
    monkeypatch.setattr(leases, "_wait_for_erasure", lambda path, kind, holder, on_wait: None)


@pytest.fixture(scope="module")
def sleepers() -> Iterator[Sleepers]:
    with open_sleepers() as made:
        yield made


def corpus(folder: Path, numbers: range) -> Path:
    for n in numbers:
        person = folder / f"person{n % 3}"
        person.mkdir(exist_ok=True, parents=True)
        cv2.imwrite(str(person / f"{n:03d}.png"), draw(n))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        name: corpus(root / name, numbers)
        for name, numbers in {"first": range(18), "more": range(18, 24), "late": range(24, 30)}.items()
    }


@pytest.fixture(scope="module")
def base(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with a report, whose index is behind the table."""
    path = tmp_path_factory.mktemp("base") / "g"
    embed(folders["first"], path, FAKES)
    index.run(index.IndexConfig(), str(path))
    embed(folders["more"], path, FAKES)
    dedup.run(build(dedup.DedupConfig), str(path))
    shutil.rmtree(path / "reports" / "graph")  # so that the next run builds one
    return path


def put(base: Path, where: str, request: pytest.FixtureRequest, tmp_path: Path, name: str = "g") -> str:
    """A copy of the gallery, on a disk or in a store."""
    if where == "disk":
        shutil.copytree(base, tmp_path / name)
        return str(tmp_path / name)
    request.getfixturevalue("bucket")
    for path in base.rglob("*"):
        if path.is_file() and not path.name.endswith(".guard"):
            storage.write(f"s3://faces/{name}/{path.relative_to(base)}", path.read_bytes())
    return f"s3://faces/{name}"


def words(name: str, gallery: str, folders: dict[str, Path]) -> list[str]:
    names = {"GALLERY": gallery, "LATE": str(folders["late"])}
    return [names.get(word, word) for word in COMMANDS[name]]


def take_over(name: str, gallery: str, folders: dict[str, Path], turn: int) -> None:
    """What another run does meanwhile."""
    embed(folders["more" if name == "embed" else "late"], gallery, FAKES)
    index.run(index.IndexConfig(), gallery)
    if turn % 2:
        compact.run(CompactConfig(keep_hours=0), gallery, everything=True)
    if name in ("dedup", "erase"):
        dedup.run(build(dedup.DedupConfig), gallery)
    if name != "compact":
        erase.run(Selection(identities=("person2",)), gallery, limit=ErasureLimit(1.0))


def read_report(gallery: str) -> dict[str, Any]:
    """The report as it is in the gallery itself, with the names of its files."""
    folder = storage.join(gallery, "reports", "dedup")
    names = sorted(name for name in storage.list_names(folder) if not name.startswith("."))
    with storage.open_seekable(storage.join(folder, "decisions.parquet")) as file:
        return {"names": names, "decisions": pq.read_table(file).to_pylist()}


def is_sound(gallery: str) -> bool:
    table = Gallery(gallery)
    problems = verify_gallery(table).problems + verify_index(table)
    found = Index(gallery).search(table.vectors()[1][:3], 1).distances
    return not problems and bool(np.all(found < 1e-3))


def sleep_and_wake(
    name: str, gallery: str, folders: dict[str, Path], sleepers: Sleepers, *, turn: int, **options: Any
) -> None:
    """Stop a command, let another run take over, and let the first go on; everything stays as the other left it."""
    sleeper = sleepers.start(*words(name, gallery, folders), jumps=bool(turn % 2), **options)
    assert sleeper.ended is None, sleeper.ended
    take_over(name, gallery, folders, turn)
    others = rows(gallery)
    report = read_report(gallery)
    had_lease = sleeper.is_leased
    ended = sleeper.wake()
    assert ended.code in (0, 1), ended
    assert "Traceback" not in ended.said
    assert ended.code == 0 or any(
        text in ended.said for text in ("was lost", "another run", "deleted meanwhile", "replaced", "cannot")
    ), ended
    if had_lease:
        assert rows(gallery) == others
        if name in ("dedup", "erase"):
            assert read_report(gallery) == report
    # The same command, or the next erasure, does what is left.
    index.run(index.IndexConfig(), gallery)
    if name == "erase":
        erase.run(Selection(identities=("person1",)), gallery, limit=ErasureLimit(1.0))
        assert not [row for row in rows(gallery) if row["identity"] == "person1"]
    assert is_sound(gallery)
    folder = storage.join(gallery, "erased")
    names = storage.list_names(folder)
    assert not [left for left in names if left.endswith((".pending", ".state", ".new"))]
    for receipt in names:
        if receipt.endswith(".json"):
            assert check_erased(Gallery(gallery), load_receipt(storage.join(folder, receipt))) == []


@pytest.fixture(scope="module")
def step_counts() -> dict[tuple[str, str], int]:
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "trial", "count", "where"), TRIALS)
def test_asleep_at_any_step(
    name: str,
    trial: int,
    count: int,
    where: str,
    base: Path,
    folders: dict[str, Path],
    sleepers: Sleepers,
    step_counts: dict[tuple[str, str], int],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if (name, where) not in step_counts:
        awake = put(base, where, request, tmp_path, "awake")
        ended = sleepers.start(*words(name, awake, folders), step=0).ended
        assert ended is not None
        assert (ended.code, ended.steps > 5) == (0, True), ended
        step_counts[name, where] = ended.steps
    gallery = put(base, where, request, tmp_path)
    # Trials are spread over all steps. The last one may not come if this run has a step less.
    step = 1 + int((step_counts[name, where] - 2) * (trial + 0.5) / count)
    sleep_and_wake(name, gallery, folders, sleepers, turn=trial, step=step)


@pytest.mark.parametrize(("name", "moment", "nth", "where"), MOMENTS)
def test_asleep_between_a_check_and_what_it_protects(
    name: str,
    moment: str,
    nth: int,
    where: str,
    base: Path,
    folders: dict[str, Path],
    sleepers: Sleepers,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    gallery = put(base, where, request, tmp_path)
    sleep_and_wake(name, gallery, folders, sleepers, turn=nth + len(moment), step=nth, only=(moment,))


def test_who_is_stopped_in_the_middle_of_a_small_write_is_named(
    tmp_path: Path, sleepers: Sleepers, base: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can write a lease then: the stopped process would put its own in its place. The others say so and end."""
    shutil.copytree(base, tmp_path / "g")
    monkeypatch.setattr(conditional, "_MAX_GUARD_SECONDS", 0.05)
    sleeper = sleepers.start(
        *words("compact", str(tmp_path / "g"), folders), step=2, only=("facepipe.storage.conditional._hash_content",)
    )
    with pytest.raises(GalleryError, match="stopped"), hold_lease(str(tmp_path / "g")):
        pass
    assert sleeper.wake().code == 0
    with hold_lease(str(tmp_path / "g")):
        pass
