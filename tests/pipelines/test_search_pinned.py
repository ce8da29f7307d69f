"""A search goes on in the index with which it began, while others publish, sweep, erase and rebuild."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.erasure.selection import Selection
from facepipe.errors import IndexReplacedError
from facepipe.gallery import Gallery
from facepipe.index.answers import SearchCounts
from pipelines import erase, index, search
from pipelines.index import IndexConfig
from pipelines.search import SearchConfig, SearchSummary, parts

COUNT = 60
BLOCK = 20


class StopError(Exception):
    """Interrupts a search."""


@pytest.fixture
def gallery(tmp_path: Path) -> str:
    path = str(tmp_path / "g")
    Gallery.create(path, CONTRACT)
    add_faces(path, 0)
    index.run(IndexConfig(), path)
    return path


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "q.parquet"
    vectors = to_float_lists(Faces().draw(np.arange(5 * BLOCK) % COUNT, 10**6))
    pq.write_table(pa.table({"embedding": vectors}), path, row_group_size=BLOCK)
    return path


def add_faces(path: str, first: int) -> None:
    people = np.arange(COUNT)
    append(Gallery(path), [rows(people, Faces().draw(people, first), first)], f"run{first}")


def update(path: str) -> None:
    add_faces(path, 1000)
    index.run(IndexConfig(), path)


def update_twice(path: str) -> None:
    update(path)
    add_faces(path, 2000)
    index.run(IndexConfig(), path)


def rebuild(path: str) -> None:
    add_faces(path, 1000)
    index.run(IndexConfig(), path, retrain=True)


def compact(path: str) -> None:
    update(path)
    index.run(IndexConfig(), path, compact_all=True)


CHANGES = [update, update_twice, rebuild, compact]


def run(gallery: str, queries: Path, out: Path, on_block: Callable[[int], None] = lambda n: None) -> SearchSummary:
    """Search for all queries; `on_block` is called with the number of finished blocks."""
    config = build(SearchConfig, {"run": {"runner": "inline", "block": BLOCK}, "search": {"k": 5}})
    finished = []

    def note(summary: SearchSummary) -> None:
        finished.append(summary.queries)
        on_block(len(finished))

    return search.run(config, gallery, str(queries), str(out), note)


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("has_new_workers", [False, True])
def test_a_search_has_one_index(
    change: Callable[[str], None], has_new_workers: bool, gallery: str, queries: Path, tmp_path: Path
) -> None:
    run(gallery, queries, tmp_path / "before.parquet")

    def interfere(block: int) -> None:
        if has_new_workers:
            parts._open_index.cache_clear()
        if block == 2:
            change(gallery)

    run(gallery, queries, tmp_path / "out.parquet", interfere)
    assert read(tmp_path / "out.parquet") == read(tmp_path / "before.parquet")
    # The next search has the new index.
    run(gallery, queries, tmp_path / "after.parquet")
    assert read(tmp_path / "after.parquet") != read(tmp_path / "before.parquet")
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == [
        *("after.parquet", "before.parquet", "out.parquet", "q.parquet")
    ]


def test_a_machine_that_sees_the_gallery_alone_can_search(
    gallery: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tasks of Ray do: what a block needs travels, and its part comes back."""
    run(gallery, queries, tmp_path / "here.parquet")
    work = tmp_path / "there.parquet.partial"

    def search_elsewhere(task: parts.SearchTask, pinned: parts.PinnedIndex) -> SearchCounts:
        sent = pickle.dumps((parts.pack_block(task, pinned.manifest.dim), pinned))
        for path in (queries, work):
            path.rename(path.with_suffix(".hidden"))
        parts._open_index.cache_clear()
        returned = pickle.dumps(parts.search_pack(*pickle.loads(sent)))
        for path in (queries, work):
            path.with_suffix(".hidden").rename(path)
        part = pickle.loads(returned)
        parts.write_part(task, part)
        return part.counts

    monkeypatch.setattr("pipelines.search.pipeline.search_block", search_elsewhere)
    summary = run(gallery, queries, tmp_path / "there.parquet")
    assert (summary.queries, summary.blocks) == (5 * BLOCK, 5)
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def stop_after_two(block: int) -> None:
    if block == 2:
        raise StopError


@pytest.mark.parametrize("change", CHANGES)
def test_an_interrupted_search_goes_on_in_its_index(
    change: Callable[[str], None], gallery: str, queries: Path, tmp_path: Path
) -> None:
    run(gallery, queries, tmp_path / "before.parquet")
    with pytest.raises(StopError):
        run(gallery, queries, tmp_path / "out.parquet", stop_after_two)
    change(gallery)
    parts._open_index.cache_clear()
    assert run(gallery, queries, tmp_path / "out.parquet").skipped_blocks == 2
    assert read(tmp_path / "out.parquet") == read(tmp_path / "before.parquet")


@pytest.mark.parametrize("change", [lambda path: None, update])
@pytest.mark.parametrize("has_new_workers", [False, True])
def test_who_is_erased_meanwhile_is_in_no_later_answer(
    change: Callable[[str], None], has_new_workers: bool, gallery: str, queries: Path, tmp_path: Path
) -> None:
    gone = "person7"

    def interfere(block: int) -> None:
        if block == 2:
            change(gallery)
            erase.run(Selection(identities=(gone,)), gallery)
        if has_new_workers:
            parts._open_index.cache_clear()

    try:
        run(gallery, queries, tmp_path / "out.parquet", interfere)
    except IndexReplacedError:
        # Its shard held the erased face, and is deleted. What is left is another index, so the search begins anew.
        if change is not update:
            raise
        run(gallery, queries, tmp_path / "out.parquet")
    answers = read(tmp_path / "out.parquet")
    later = [row for row in answers if int(row["query_id"]) >= 2 * BLOCK]
    assert len(later) == 3 * BLOCK * 5
    assert not any(row["identity"] == gone for row in later)


def test_an_index_that_is_deleted_is_searched_anew(gallery: str, queries: Path, tmp_path: Path) -> None:
    """Replaced shards are not kept: the search cannot go on, and the next one begins with the new index."""
    with pytest.raises(StopError):
        run(gallery, queries, tmp_path / "out.parquet", stop_after_two)
    add_faces(gallery, 1000)
    index.run(build(IndexConfig, {"index": {"keep_hours": 0}}), gallery, retrain=True)
    parts._open_index.cache_clear()
    assert run(gallery, queries, tmp_path / "out.parquet").skipped_blocks == 0
    run(gallery, queries, tmp_path / "after.parquet")
    assert read(tmp_path / "out.parquet") == read(tmp_path / "after.parquet")


def test_a_damaged_pin_is_no_pin(gallery: str, queries: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        run(gallery, queries, tmp_path / "out.parquet", stop_after_two)
    for data in (b"", b"{}", b'{"erasures": 1, "manifest": []}'):
        (tmp_path / "out.parquet.partial" / "index.json").write_bytes(data)
        assert parts.load_pinned_index(str(tmp_path / "out.parquet.partial"), gallery) is None
    # The same index is still published, so that the finished blocks count.
    assert run(gallery, queries, tmp_path / "out.parquet").skipped_blocks == 2
