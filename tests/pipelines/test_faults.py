"""The fault matrix: full disks, a store that fails, crashes, clocks, two at once, damage, signals. Ten trials each.

After every fault the same command goes on, and the gallery is then what an undisturbed one is, row for row. SIGKILL of
driver and worker is in test_crash.py, of a Ray node in test_ray_nodes.py; the lease's own tests are in test_lease.py.
"""

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import faults
import numpy as np
import psutil
import pytest
from conftest import draw
from helpers import rows, trials
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from facepipe import storage
from facepipe.errors import IndexingError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.gallery.table import RUNS
from facepipe.index import manifest
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from jobs.cli import app
from pipelines.runtime import crash_marks as attempts
from pipelines.runtime.crash_marks import CrashMarks

pytestmark = pytest.mark.slow

TRIALS = trials(10)
IMAGES = 40
FAKES = [*("--set", "detect.model=fake-detector"), *("--set", "embed.model=fake-embedder")]
SMALL = [*("--set", "run.block_smallest=4"), *("--set", "run.block_largest=8"), *("--set", "run.commit_seconds=0.02")]
INLINE = [*FAKES, *SMALL, "--runner", "inline", "--quiet"]
LOCAL = [*FAKES, *SMALL, "--runner", "local", "--workers", "2", "--quiet"]
FATAL = ["--set", "detect.model=fatal-detector"]

Rows = list[dict[str, Any]]


def call(*words: str | Path) -> tuple[int, str]:
    """(exit code, what was said) of a command; what no command expects, and users would see as a traceback, is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout + result.stderr


def started(*words: str | Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options)


def ended(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    """(exit code, stderr) of a process that ends by itself."""
    with process:
        return process.wait(seconds), process.communicate()[1]


def sound(gallery: str | Path, expected: Rows, indexed: bool = False) -> None:
    """A gallery is what an undisturbed one is, and nothing is left of what happened to it."""
    assert rows(gallery) == expected
    assert verify_gallery(Gallery(str(gallery))).problems == []
    if indexed:
        assert verify_index(Gallery(str(gallery))) == []
        assert manifest.load(str(gallery)).live == sum(row["face_id"] is not None for row in expected)
    assert leftovers(gallery) == []


def leftovers(gallery: str | Path) -> list[str]:
    """Files that a good run leaves to nobody: marks, half files. Parts without a commit are the vacuum's."""
    base = str(gallery).rstrip("/") + "/"
    names = [found.url.removeprefix(base) for found in storage.list_files(str(gallery))]
    marks = [name for name in names if name.startswith(f"{RUNS}/") and name.count("/") > 1]
    return marks + [name for name in names if name.endswith((".new", ".part", ".tmp", ".partial"))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, two of them broken."""
    root = tmp_path_factory.mktemp("corpus")
    for n in range(IMAGES):
        data = cv2.imencode(".png", draw(n))[1].tobytes()
        (root / f"{n:02d}.png").write_bytes(data[: len(data) // 2] if n % 20 == 7 else data)
    return root


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery that nothing happened to, with its index."""
    gallery = tmp_path_factory.mktemp("whole") / "g"
    assert call("embed", corpus, gallery, *INLINE)[0] == 0
    assert call("index", gallery, "--quiet")[0] == 0
    return gallery


@pytest.fixture(scope="module")
def expected(whole: Path) -> Rows:
    return rows(whole)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "g")
    return tmp_path / "g"


def make_gallery(path: str | Path, like: Path) -> None:
    """An empty one."""
    Gallery.create(str(path), Gallery(str(like)).contract)


# --- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS)
def test_a_full_disk(trial: int, corpus: Path, whole: Path, expected: Rows, tmp_path: Path) -> None:
    """Embed and index on a disk that is a little larger each time: each failure is said, and nothing is lost by it."""
    rng = random.Random(trial)
    with faults.disk(tmp_path / "disk", 1 << 20) as disk:
        if disk is None:
            pytest.skip("nobody may mount a disk here")
        gallery, failed = disk.path / "g", 0
        make_gallery(gallery, whole)
        disk.resize((5 + trial) * 4096)
        for words in (["embed", corpus, gallery, *INLINE], ["index", gallery, "--quiet"]):
            for _ in range(200):
                code, said = call(*words)
                if code == 0:
                    break
                failed += 1
                assert code == 1, said
                assert any(text in said.lower() for text in ("no space left on device", "mib left", "repair")), said
                assert disk.resize(disk.size() + rng.randint(1, 12) * 4096)
            assert code == 0, said
        sound(gallery, expected, indexed=True)
    assert failed > 0


@pytest.mark.parametrize("trial", TRIALS)
def test_writes_that_fail_at_random(
    trial: int, corpus: Path, expected: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For where no disk can be mounted; and a write may fail that takes no room, or after the bytes are written."""
    rng, real = random.Random(trial), os.fsync

    def fsync(fd: int) -> None:
        if rng.random() < 0.1 and stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)

    gallery = tmp_path / "g"
    for words in (["embed", corpus, gallery, *INLINE], ["index", gallery, "--quiet"]):
        for attempt in range(100):
            monkeypatch.setattr(os, "fsync", fsync if attempt < 99 else real)
            code, said = call(*words)
            if code == 0:
                break
            assert code == 1, said
            assert "no space left" in said.lower(), said
    monkeypatch.undo()
    assert call("embed", corpus, gallery, *INLINE)[0] == 0
    sound(gallery, expected, indexed=True)


def test_a_disk_too_full_to_begin(corpus: Path, expected: Rows, tmp_path: Path) -> None:
    with faults.disk(tmp_path / "disk", 4096) as disk:
        if disk is None:
            pytest.skip("nobody may mount a disk here")
        for pages in range(1, 8):
            disk.resize(pages * 4096)
            code, said = call("embed", corpus, disk.path / "g", *INLINE)
            assert (code, "no space left" in said.lower()) == (1, True), said
        disk.resize(1 << 20)
        assert call("embed", corpus, disk.path / "g", *INLINE)[0] == 0
        sound(disk.path / "g", expected)


def test_an_index_that_is_cut_short_is_not_published(copy: Path, corpus: Path, whole: Path, tmp_path: Path) -> None:
    """Whatever the room: an index that was said to be written can be searched."""
    with faults.disk(tmp_path / "disk", 1 << 20) as disk:
        if disk is None:
            pytest.skip("nobody may mount a disk here")
        shutil.copytree(whole, disk.path / "g")
        shutil.rmtree(disk.path / "g" / "index")
        for pages in range(1, 40):
            disk.resize(disk.used() + pages * 4096)
            code, said = call("index", disk.path / "g", "--quiet")
            assert "--repair" not in said, f"it found its own shard damaged with {pages} pages to write to"
            if code == 0:
                return


# --- a store that fails ------------------------------------------------------------------------------------------------

G = "s3://faces/g"
TROUBLE: list[dict[str, Any]] = [
    {"status_500": 0.06},
    {"status_503": 0.06},
    {"status_429": 0.03},
    {"reset": 0.05},
    {"truncated": 0.03},
    {"short": 0.2},
    {"slow": 0.03},
    {"lost": 0.2, "only": ("PUT",)},
    {"lost": 0.3, "only": ("PUT",)},
    {"status_503": 1.0, "after": 30},
    {"status_500": 0.02, "reset": 0.02, "truncated": 0.02, "slow": 0.01, "lost": 0.03},
    {"status_503": 0.02, "reset": 0.02, "short": 0.05, "slow": 0.01, "lost": 0.04},
]


@pytest.fixture(scope="module")
def proxy(s3_server: str) -> Iterator[faults.Proxy]:
    with faults.proxy(s3_server) as made:
        yield made


@pytest.fixture
def store(bucket: Any, proxy: faults.Proxy, monkeypatch: pytest.MonkeyPatch) -> faults.Proxy:
    """The bucket behind the proxy, and no patience."""
    proxy.set()
    proxy.given.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    options = {"max_retries": "4", "retry_timeout": "2s", "allow_http": "true"}
    monkeypatch.setattr("facepipe.gallery.table.get_delta_options", lambda path: options)
    monkeypatch.setenv("FACEPIPE_RETRY_SECONDS", "2")
    storage.open_bucket.cache_clear()
    return proxy


@pytest.mark.parametrize("trial", range(len(TROUBLE)))
def test_a_store_that_fails(trial: int, corpus: Path, whole: Path, expected: Rows, store: faults.Proxy) -> None:
    """Embed and index succeed, or say why not and go on where they were; nothing is committed twice."""
    trouble = dict(TROUBLE[trial])
    make_gallery(G, whole)
    large = ["--set", "run.block_smallest=20", "--set", "run.block_largest=20"]  # fewer requests
    for words in (["embed", corpus, G, *INLINE, *large], ["index", G, "--quiet"]):
        for attempt in range(8):
            store.set(seed=100 * trial + attempt, **(trouble if attempt < 7 else {}))
            code, said = call(*words)
            if code == 0:
                break
            assert code == 1, said
            if "after" in trouble:
                trouble["after"] += 120
        assert code == 0, said
    store.set()
    assert set(store.given) - {""}, "nothing went wrong"
    sound(G, expected, indexed=True)


# --- crashes -----------------------------------------------------------------------------------------------------------


def poisoned(corpus: Path, folder: Path, *names: str, side: int = 64) -> Path:
    """A copy of a corpus, with images that kill: of the colour that the fatal detector dies of, or just too large."""
    shutil.copytree(corpus, folder)
    for name in names:
        cv2.imwrite(str(folder / name), np.full((side, side, 3), (250, 10, 250), np.uint8))
    return folder


def innocent(found: Rows) -> Rows:
    """Rows of the images that harm nobody, as in the corpus that was copied; another detector failed to find a face."""
    kept = [row for row in found if "fatal" not in row["uri"]]
    other = ("uri", "source", "fingerprint", "face_id", "failed_with")
    return [{k: v for k, v in row.items() if k not in other} for row in kept]


@pytest.mark.parametrize("trial", TRIALS)
def test_a_worker_that_dies_of_an_image(trial: int, corpus: Path, expected: Rows, tmp_path: Path) -> None:
    rng = random.Random(trial)
    names = [f"{n:02d}-fatal.png" for n in rng.sample(range(IMAGES), 1 + trial % 2)]
    folder, gallery = poisoned(corpus, tmp_path / "c", *names), tmp_path / "g"
    code, said = call("embed", folder, gallery, *LOCAL, *FATAL)
    assert code == 0, said
    found = rows(gallery)
    assert sorted(Path(r["uri"]).name for r in found if r["status"] == "crashed") == sorted(names)
    assert innocent(found) == innocent(expected)
    assert leftovers(gallery) == []
    assert not workers_left()


def workers_left() -> list[psutil.Process]:
    """Worker processes of runs in this process."""
    return [p for p in psutil.Process().children() if "pipelines.runtime.runners.child" in p.cmdline()]


def name_run(number: int) -> str:
    """The id of a run; ids sort by time."""
    return f"20261101T000000-{number:06x}"


def die(folder: Path, run: int, uris: list[str], alone: str | None) -> None:
    """A run that dies while it has these in hand, in a block; `alone`: while it tries that one."""
    attempts.inherit_crash_marks(str(folder), name_run(run))
    found = CrashMarks(str(folder / name_run(run) / "Read-Embed"))
    block = found.mark_block(uris)
    block.__enter__()
    if alone is not None:
        found.mark_image(alone).__enter__()
    _UNFINISHED.append((block, found))


_UNFINISHED: list[Any] = []  # contexts that are never left, as where a process dies


def test_an_image_that_takes_whole_runs_down_is_set_aside_by_the_fourth(tmp_path: Path) -> None:
    uris = [f"u{n}" for n in range(6)]
    die(tmp_path, 0, uris, None)
    die(tmp_path, 1, uris, "u3")
    die(tmp_path, 2, uris, "u3")
    attempts.inherit_crash_marks(str(tmp_path), name_run(3))
    last = CrashMarks(str(tmp_path / name_run(3) / "Read-Embed"))
    with last.mark_block(uris) as one_by_one:
        assert one_by_one
        for uri in uris:
            with last.mark_image(uri) as crashed:
                assert crashed == (uri == "u3")
    attempts.delete_crash_marks(str(tmp_path))
    assert not any(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
def test_nobody_is_set_aside_who_was_not_alone_twice(
    tmp_path_factory: pytest.TempPathFactory, deaths: list[tuple[int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    uris, alone = [f"u{n}" for n in range(10)], dict.fromkeys(range(10), 0)
    for run, (n, in_block) in enumerate(deaths):
        die(folder, run, uris, None if in_block else f"u{n}")
        alone[n] += not in_block
    attempts.inherit_crash_marks(str(folder), name_run(99))
    last = CrashMarks(str(folder / name_run(99) / "Read-Embed"))
    with last.mark_block(uris):
        for n, uri in enumerate(uris):
            with last.mark_image(uri) as crashed:
                assert crashed == (alone[n] >= 2)


@pytest.mark.parametrize("text", ["", "0123456789abcdef", "0123456789abcdef x", "a b c\n\n\0\0", "\xff" * 50])
def test_marks_that_are_cut_short_stop_nobody(text: str, tmp_path: Path) -> None:
    for name in ("suspects", "Read/image-0123456789abcdef", "Read/block-3"):
        (tmp_path / name_run(0) / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name_run(0) / name).write_text(text, encoding="utf-8")
    attempts.inherit_crash_marks(str(tmp_path), name_run(1))
    with CrashMarks(str(tmp_path / name_run(1) / "Read")).mark_block(["u"]):
        pass
    attempts.delete_crash_marks(str(tmp_path))
    assert not any(tmp_path.iterdir())


def kill_family(process: subprocess.Popen[str]) -> None:
    """All of a command at once, as where a pod is killed."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(family, 10)
    ended(process)


def test_ten_kills_of_everything_in_a_row_set_nobody_aside(corpus: Path, expected: Rows, tmp_path: Path) -> None:
    rng, gallery = random.Random(7), tmp_path / "g"
    for _ in TRIALS:
        process = started("embed", corpus, gallery, *LOCAL)
        wait_for_work(process, gallery, rng.uniform(0, 0.7))
        kill_family(process)
    assert call("embed", corpus, gallery, *INLINE)[0] == 0
    sound(gallery, expected)


def wait_for_work(process: subprocess.Popen[str], gallery: Path, seconds: float) -> None:
    """Until a run has begun, and some seconds longer; or until it has ended."""
    lock = gallery / ".lock"
    before = lock.read_bytes() if lock.exists() else b""
    while process.poll() is None and (not lock.exists() or lock.read_bytes() == before):
        time.sleep(0.01)
    ends = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < ends:
        time.sleep(0.01)


@pytest.mark.parametrize("trial", TRIALS)
def test_no_memory_left(trial: int, corpus: Path, expected: Rows, tmp_path: Path) -> None:
    """One image wants more memory than there is. The kernel kills a worker, or the whole run: it is set aside, after
    three runs at most, and everything else is there."""
    runner = INLINE if trial % 5 == 0 else [*LOCAL, "--workers", "1"]
    name = f"{random.Random(trial).randrange(IMAGES):02d}-fatal.png"
    folder, gallery = poisoned(corpus, tmp_path / "c", name, side=9000), tmp_path / "g"
    with faults.memory((330 if runner is INLINE else 480) << 20) as enter:
        if enter is None:
            pytest.skip("nobody may limit memory here")
        runs = 0
        while runs < 4:
            runs += 1
            code, said = ended(started("embed", folder, gallery, *runner, preexec_fn=enter))
            if code == 0:
                break
            assert code in (1, -signal.SIGKILL), said
        assert code == 0, said
        assert runs == 4 or runner is not INLINE
    found = rows(gallery)
    assert [Path(r["uri"]).name for r in found if r["status"] == "crashed"] == [name]
    assert innocent(found) == innocent(expected)
    assert leftovers(gallery) == []


# --- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS)
def test_signals(trial: int, corpus: Path, expected: Rows, tmp_path: Path) -> None:
    """SIGTERM ends with 143, Ctrl-C with 130: what was finished is committed, the lease let go, no process left."""
    number, code = (signal.SIGINT, 130) if trial % 3 == 2 else (signal.SIGTERM, 143)
    gallery = tmp_path / "g"
    late = ["--set", "run.commit_seconds=60"] if trial % 2 else []
    process = started("embed", corpus, gallery, *LOCAL, *late)
    wait_for_work(process, gallery, random.Random(trial).uniform(0.0, 1.6))
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(number)
    got, said = ended(process, 20)
    assert "Traceback" not in said
    if got in (0, -number):  # the work was done, and the program as good as over
        assert rows(gallery) == expected
    else:
        assert (got, "kept" in said) == (code, True), said
    assert not psutil.wait_procs(family, 5)[1], "processes are left"
    assert json.loads((gallery / ".lock").read_text())["released"]
    if Gallery.exists(str(gallery)):
        parts = {path.name for path in (gallery / "faces").glob("*.parquet")}
        committed = {file["path"] for file in Gallery(str(gallery)).files()}
        assert len(parts - committed) <= 2, "what the workers had in hand, and no more"
    assert leftovers(gallery) == []
    assert call("embed", corpus, gallery, *INLINE)[0] == 0
    sound(gallery, expected)


# --- clocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS)
def test_a_clock_that_jumps(trial: int, corpus: Path, expected: Rows, tmp_path: Path) -> None:
    """By years, forward and back, all the while: no image is lost, doubled, read again or taken for missing."""
    folder, gallery = tmp_path / "corpus0", tmp_path / "g"
    shutil.copytree(corpus, folder)
    marking = ["--set", "missing.policy=mark", "--identity", "none", "--json"]
    with faults.wild_clock(trial):
        for _ in range(2):
            code, said = call("embed", folder, gallery, *INLINE, *marking)
            assert code == 0, said
            assert call("index", gallery, "--quiet")[0] == 0
        assert json.loads(said)["skipped"] == IMAGES
        (folder / "03.png").unlink()
        code, said = call("embed", folder, gallery, *INLINE, *marking)
        assert code == 0, said
    found = rows(gallery)
    assert {Path(row["uri"]).name for row in found if row["missing_since"]} == {"03.png"}
    assert innocent([{**row, "missing_since": None} for row in found]) == innocent(expected)
    assert verify_gallery(Gallery(str(gallery))).problems == []
    assert verify_index(Gallery(str(gallery))) == []
    assert leftovers(gallery) == []


@pytest.fixture(scope="module")
def start() -> Iterator[faults.Start]:
    with faults.start() as made:
        yield made


# --- two at once -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", TRIALS)
def test_nightly_jobs_at_once(trial: int, start: faults.Start, expected: Rows, copy: Path, tmp_path: Path) -> None:
    """Of two or three that start at the same moment one works; the others say who does, and end with 1."""
    folder = tmp_path / "c"
    folder.mkdir()
    for n in range(60, 64):
        cv2.imwrite(str(folder / f"{n}.png"), draw(n))
    config = tmp_path / "nightly.toml"
    config.write_text(
        f"""gallery = "{copy}"
[[source]]
uri = "{folder}"
name = "more"
[night]
clusters = "no"
dedup = false
[detect]
model = "fake-detector"
[embed]
model = "fake-embedder"
[run]
runner = "inline"
"""
    )
    night = ["nightly", str(config), "--quiet"]
    results = start(*[night for _ in range(3 if trial % 5 == 0 else 2)])
    codes = sorted(code for code, _ in results)
    assert codes[0] == 0, results
    assert set(codes) <= {0, 1}, results
    for code, said in results:
        assert "Traceback" not in said
        assert code == 0 or "another run" in said, said
    # A second that came when the first had ended found nothing to do.
    assert len([row for row in rows(copy) if row["source"] == "more" and row["face_index"] in (0, None)]) == 4
    assert [row for row in rows(copy) if row["source"] != "more"] == expected
    assert verify_gallery(Gallery(str(copy))).problems == []
    assert verify_index(Gallery(str(copy))) == []
    assert leftovers(copy) == []


# --- damage ------------------------------------------------------------------------------------------------------------


def searched(gallery: Path, expected: Rows) -> str:
    """What went wrong when every face was looked for; nothing where each finds itself, or one that looks the same."""
    asked = np.array([row["embedding"] for row in expected if row["embedding"] is not None], np.float32)
    try:
        found = Index(str(gallery)).search(asked, 1)
    except IndexingError as error:
        return str(error)
    return "" if np.abs(found.distances).max() < 1e-3 else "wrong answers"


def harm(path: Path, how: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.mark.parametrize("trial", trials(12))
def test_a_damaged_table_file(trial: int, corpus: Path, expected: Rows, copy: Path) -> None:
    """verify names it; every command says so or is right all the same; `embed` writes no row of what it cannot read."""
    rng, how = random.Random(trial), ("flipped", "truncated", "deleted")[trial % 3]
    gallery = Gallery(str(copy))
    victim = rng.choice(sorted(file["path"] for file in gallery.files()))
    harm(copy / "faces" / victim, how, rng)
    assert any(victim in problem for problem in verify_gallery(gallery).problems)
    code, said = call("verify", copy)
    assert (code, victim in said.replace("\n", "")) == (1, True)
    for words in (
        ["embed", corpus, copy, *INLINE],
        ["index", copy, "--retrain", "--quiet"],
        ["info", copy],
    ):
        code, said = call(*words)
        assert code in (0, 1), said
        assert code == 0 or "facepipe: " in said, said
    assert len(Gallery(str(copy)).files()) == len(gallery.files())


@pytest.mark.parametrize("trial", TRIALS)
def test_a_damaged_shard(trial: int, copy: Path, corpus: Path, expected: Rows) -> None:
    rng, how = random.Random(trial), ("flipped", "truncated", "deleted")[trial % 3]
    shard = manifest.load(str(copy)).shards[0]
    name = rng.choice(sorted(shard.files))
    harm(copy / "index" / shard.name / name, how, rng)
    assert any(shard.name in problem for problem in verify_index(Gallery(str(copy))))
    said = searched(copy, expected)
    assert not said or "--repair" in said
    code, said = call("index", copy, "--repair", "--quiet")
    assert code == 0, said
    sound(copy, expected, indexed=True)
