"""Erase requests while a run is going on: hidden at once, deleted by the run, and the same result at any moment."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import draw
from helpers import rows, trials
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.config import build
from facepipe.erasure import pending, takeup
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.proof import check_erased
from facepipe.erasure.receipt import load_receipt
from facepipe.erasure.selection import Selection
from facepipe.errors import StorageError
from facepipe.gallery import Gallery, hidden
from facepipe.gallery.export import export_parquet
from facepipe.gallery.maintenance import compact as steps
from facepipe.gallery.maintenance.compact import CompactConfig
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index.search import Index
from facepipe.index.verify import verify_index
from facepipe.storage.lease import hold_lease
from pipelines import compact, erase, index
from pipelines.embed import EmbedConfig, EmbedSummary, run

Rows = list[dict[str, Any]]
FAKES = {
    "detect": {"model": "fake-detector"},
    "embed": {"model": "fake-embedder"},
    "run": {"runner": "inline", "block_smallest": 2, "block_largest": 4, "commit_seconds": 0.0},
    "source": {"identity": "folder", "name": "corpus"},
}
# These galleries are so small that most selections are a large share of them.
EVERYTHING = ErasureLimit(1.0)
SELECTIONS = {
    "person": Selection(identities=("b",)),
    "pattern": Selection(uri="*/a/*"),
    "corpus": Selection(source="corpus"),
    "age": Selection(older_than_days=0.0),
    "nobody": Selection(identities=("x",)),
    "two": Selection(identities=("a", "b"), uri="*/b/*"),
}


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    """Commit after every block, and look for requests often."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.embed.pipeline._COMMIT_PAUSE", 0)
        patch.setattr(takeup, "_POLL_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three persons of six images. Two images of b are also in other folders, one listed before and one after b's."""
    root = tmp_path_factory.mktemp("corpus")
    for n in range(18):
        folder = root / "abc"[n % 3]
        folder.mkdir(exist_ok=True)
        cv2.imwrite(str(folder / f"{n:02d}.png"), draw(n, 48))
    shutil.copy(root / "b" / "16.png", root / "a" / "copy.png")
    shutil.copy(root / "b" / "01.png", root / "c" / "copy.png")
    return root


def embed(corpus: Path, gallery: Path | str, progress: Callable[[EmbedSummary], None] = lambda s: None) -> EmbedSummary:
    config = build(EmbedConfig, FAKES, {"source": {"uri": str(corpus)}})
    return run(config, str(gallery), progress)


@pytest.fixture(scope="module")
def wholes(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """What is left where each selection was erased after the run."""
    folder = tmp_path_factory.mktemp("whole")
    embed(corpus, folder / "g")
    left = {}
    for name, selection in SELECTIONS.items():
        shutil.copytree(folder / "g", folder / name)
        erase.run(selection, str(folder / name), limit=EVERYTHING)
        left[name] = rows(folder / name)
    return left


def is_sound(gallery: Path | str, expected: Rows) -> None:
    assert rows(gallery) == expected
    opened = Gallery(str(gallery))
    assert verify_gallery(opened).problems == []
    assert hidden.list_requests(opened.path) == ()
    assert pending.read_unfinished(opened.path) == []
    for path in Path(gallery, "erased").glob("*.json"):
        assert check_erased(opened, load_receipt(str(path))) == []


class AtRecord:
    """Does something when a run has finished so many blocks."""

    def __init__(self, moment: int, action: Callable[[], Any]):
        self.moment = moment
        self.action = action
        self.count = 0
        self.result: Any = None

    def __call__(self, summary: EmbedSummary) -> None:
        self.count += 1
        if self.count == self.moment:
            self.result = self.action()


@settings(max_examples=len(trials(20)))
@given(moment=st.integers(1, 9), name=st.sampled_from(sorted(SELECTIONS)), commits=st.sampled_from([0.0, 1000.0]))
def test_a_request_at_any_moment_is_an_erasure_after_the_run(
    moment: int,
    name: str,
    commits: float,
    corpus: Path,
    wholes: dict[str, Rows],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    gallery = str(tmp_path_factory.mktemp("g") / "g")
    selection = SELECTIONS[name]
    at = AtRecord(moment, lambda: erase.run(selection, gallery, wait=False, limit=EVERYTHING))
    config = build(EmbedConfig, FAKES, {"source": {"uri": str(corpus)}, "run": {"commit_seconds": commits}})
    run(config, gallery, at)
    assert at.count >= 6
    # Of an age of zero days is what had been embedded when it was requested.
    is_sound(gallery, rows(gallery) if name == "age" else wholes[name])
    again = embed(corpus, gallery)
    assert again.images == 0, "they do not come back"


def test_a_run_completes_a_request_while_it_goes_on(
    corpus: Path, wholes: dict[str, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeup, "_BLOCK_SECONDS", 0.0)
    gallery = str(tmp_path / "g")
    opened: list[Any] = []

    def ask() -> Any:
        index.run(index.IndexConfig(), gallery)
        opened.append(Gallery(gallery))
        opened.append(Index(gallery))
        summary = erase.run(SELECTIONS["person"], gallery, limit=EVERYTHING)
        assert summary.complete
        # Its files are deleted, so it cannot be read any more.
        with pytest.raises(StorageError):
            opened[0].to_arrow()
        assert set(opened[1].get_labels(opened[1].shards[0].ids)["identity"].to_pylist()) == {"a", None}
        assert check_erased(Gallery(gallery), load_receipt(summary.receipts[0])) == []
        return summary

    at = AtRecord(6, ask)
    embed(corpus, gallery, at)
    assert at.result.images
    is_sound(gallery, wholes["person"])
    assert at.count > at.moment
    follow_ups = [load_receipt(str(path)) for path in Path(gallery, "erased").glob("*.json")]
    assert {made.continues for made in follow_ups} <= {"", at.result.request}
    assert verify_index(Gallery(gallery)) == []


def test_requests_of_several_kinds_at_once(corpus: Path, wholes: dict[str, Rows], tmp_path: Path) -> None:
    gallery = str(tmp_path / "g")

    def ask() -> None:
        for selection in (SELECTIONS["pattern"], Selection(identities=("c",)), SELECTIONS["person"]):
            erase.run(selection, gallery, wait=False, limit=EVERYTHING)

    embed(corpus, gallery, AtRecord(6, ask))
    is_sound(gallery, [])


def test_images_that_may_return_do_so_with_the_next_run(corpus: Path, wholes: dict[str, Rows], tmp_path: Path) -> None:
    gallery = str(tmp_path / "g")
    at = AtRecord(6, lambda: erase.run(SELECTIONS["person"], gallery, may_return=True, wait=False, limit=EVERYTHING))
    embed(corpus, gallery, at)
    assert at.result.images
    is_sound(gallery, wholes["person"])
    assert embed(corpus, gallery).images == 8


def test_readers_that_are_open_follow(corpus: Path, wholes: dict[str, Rows], tmp_path: Path) -> None:
    """A gallery, an export and an index that were opened before the request, while nobody can delete anything."""
    gallery = str(tmp_path / "g")
    embed(corpus, gallery)
    index.run(index.IndexConfig(), gallery)
    table, frozen, searcher = Gallery(gallery), Gallery(gallery), Index(gallery)
    frozen.freeze()
    ids, vectors = table.vectors("identity = 'b'")
    assert len(ids)
    labels = searcher.get_labels(ids)["identity"].to_pylist()
    assert set(labels) == {"b"}
    with hold_lease(gallery):
        summary = erase.run(SELECTIONS["person"], gallery, wait=False, limit=EVERYTHING)
        assert not summary.complete
        assert len(table.vectors("identity = 'b'")[0]) == 0
        assert table.dataset().to_table(filter=None).num_rows == len(wholes["person"])
        assert export_parquet(table, str(tmp_path / "out"), ["uri"]) == len(wholes["person"])
        found = searcher.search(vectors, k=30).ids
        assert not set(ids.tolist()) & set(found.ravel().tolist())
        assert searcher.get_labels(ids)["identity"].to_pylist() == [None] * len(ids)
        assert not searcher.get_vectors(ids).any()
        assert len(frozen.vectors("identity = 'b'")[0]) == len(ids), "several passes agree"
        assert searcher.live == Gallery(gallery).counts()["faces"]
    erase.resume(gallery)
    is_sound(gallery, wholes["person"])
    assert searcher.search(vectors, k=30).ids.max() > 0
    assert searcher.live == Index(gallery).live


def test_an_index_that_was_asked_nothing_meanwhile_follows_too(
    corpus: Path, wholes: dict[str, Rows], tmp_path: Path
) -> None:
    gallery = str(tmp_path / "g")
    embed(corpus, gallery)
    index.run(index.IndexConfig(), gallery)
    ids, vectors = Gallery(gallery).vectors("identity = 'b'")
    for merge in (False, True):
        searcher = Index(gallery, merge=merge)
        searcher.search(vectors)
        if not merge:
            erase.run(SELECTIONS["person"], gallery, limit=EVERYTHING)
        found = searcher.search(vectors, k=30).ids
        assert not set(ids.tolist()) & set(found.ravel().tolist())
        assert not searcher.get_vectors(ids).any()


def test_an_index_run_that_was_going_on_deletes_what_it_has_built(
    corpus: Path, wholes: dict[str, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = str(tmp_path / "g")
    embed(corpus, gallery)
    ids, vectors = Gallery(gallery).vectors("identity = 'b'")
    asked: list[Any] = []
    real = index.pipeline.build_shard

    def build_shard(*args: Any) -> Any:
        entry = real(*args)
        if not asked:
            asked.append(erase.run(SELECTIONS["person"], gallery, wait=False, limit=EVERYTHING))
            assert not asked[0].complete
        return entry

    monkeypatch.setattr(index.pipeline, "build_shard", build_shard)
    index.run(index.IndexConfig(), gallery)
    is_sound(gallery, wholes["person"])
    assert verify_index(Gallery(gallery)) == []
    assert not set(ids.tolist()) & set(Index(gallery).search(vectors, k=30).ids.ravel().tolist())


def test_compaction_takes_requests_up(
    corpus: Path, wholes: dict[str, Rows], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = str(tmp_path / "g")
    embed(corpus, gallery)
    asked: list[Any] = []
    real = steps._join_group

    def join(*args: Any) -> Any:
        if not asked:
            asked.append(erase.run(SELECTIONS["person"], gallery, wait=False, limit=EVERYTHING))
        return real(*args)

    monkeypatch.setattr(steps, "_join_group", join)
    compact.run(CompactConfig(keep_hours=0), gallery, everything=True)
    is_sound(gallery, wholes["person"])


KILLER = """
import json, os, signal, sys
from facepipe import storage
from facepipe.config import build
from facepipe.erasure import takeup
from facepipe.erasure.limits import ErasureLimit
from facepipe.erasure.selection import Selection
from pipelines import erase
from pipelines.embed import EmbedConfig, pipeline
settings = json.loads(sys.argv[1])
takeup._POLL_SECONDS = 0.02
pipeline._COMMIT_PAUSE = 0
count = blocks = 0
is_armed = False
def counted(real):
    def write(*args, **kwargs):
        global count
        if is_armed:
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return write
for owner, name in ((storage, "write"), (storage, "delete"), (os, "replace"), (os, "rename"), (os, "unlink")):
    setattr(owner, name, counted(getattr(owner, name)))
def ask(summary):
    global blocks, is_armed
    blocks += 1
    if blocks == 6:
        is_armed = True
        erase.run(Selection(identities=("b",)), path, wait=False, limit=ErasureLimit(1.0))
for path, at in zip(sys.argv[2::2], map(int, sys.argv[3::2])):
    if os.fork() == 0:
        pipeline.run(build(EmbedConfig, settings), path, ask)
        print(count, flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_killed_in_any_place_the_next_run_goes_on(corpus: Path, wholes: dict[str, Rows], tmp_path: Path) -> None:
    """SIGKILL at the n-th write after a request was made: of the run, of the request, or of the erasure."""

    def start(*words: object) -> list[int]:
        script = tmp_path / "kill.py"
        script.write_text(KILLER)
        wanted = json.dumps({**FAKES, "source": {**FAKES["source"], "uri": str(corpus)}})
        command = [sys.executable, str(script), wanted, *map(str, words)]
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return [int(line) for line in found.stdout.splitlines()]

    total, code = start(tmp_path / "undisturbed", -1)
    assert code == 0
    is_sound(tmp_path / "undisturbed", wholes["person"])
    places = [(tmp_path / f"at{at}", at) for at in np.linspace(1, total - 1, len(trials(12))).astype(int).tolist()]
    ends = start(*(word for place in places for word in place))
    # The order of writes of the two threads differs, and the last ones may not be reached.
    assert ends.count(-signal.SIGKILL) >= len(places) - 2
    for copy, _ in places:
        erase.resume(str(copy))
        assert not pending.read_unfinished(str(copy))
        embed(corpus, copy)
        # What a run that was killed had not embedded yet came with this one: it was not there when it was requested.
        erase.run(SELECTIONS["person"], str(copy), limit=EVERYTHING)
        is_sound(copy, wholes["person"])
