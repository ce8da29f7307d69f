"""Search on owners in a Ray cluster: the answers of one process, also if owners and nodes are killed meanwhile."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from ray_nodes import Cluster, cluster

from facepipe import storage
from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.erasure.selection import Selection
from facepipe.errors import ConfigError, IndexReplacedError, WorkerError
from facepipe.gallery import Gallery
from pipelines import erase
from pipelines.index import IndexConfig
from pipelines.index import run as index
from pipelines.search import SearchConfig, SearchSummary, owners
from pipelines.search import run as search

COUNT = 2000
BLOCK = 40
FIND = {"path": "lists", "k": 5, "threshold": 0.4}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("owners") / "g")
    identities, vectors = next(iter(Faces().blocks(COUNT)))
    table = rows(identities, vectors, 0)
    append(Gallery.create(path, CONTRACT), [table.slice(at, 125) for at in range(0, COUNT, 125)], "first")
    index(build(IndexConfig, {"index": {"factory": "IVF32,PQ64x4fs", "shard_vectors": 250}}), path)
    return path


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "q.parquet"
    vectors = Faces().draw(np.arange(8 * BLOCK) % 200, 10**9)
    pq.write_table(pa.table({"embedding": to_float_lists(vectors)}), path, row_group_size=BLOCK)
    return path


@pytest.fixture(scope="module")
def shared_nodes() -> Iterator[Cluster]:
    with cluster((1, 1, 1)) as made:
        yield made
    assert not made.processes()


@pytest.fixture
def nodes(shared_nodes: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Three nodes, to which searches of this process connect; those that a test has killed are replaced."""
    shared_nodes.refill()
    for name, value in shared_nodes.environment.items():
        monkeypatch.setenv(name, value)
    return shared_nodes


def run(
    gallery: str,
    queries: Path,
    out: Path,
    on_block: Callable[[int], None] = lambda n: None,
    find: dict[str, Any] = FIND,
    **settings: Any,
) -> tuple[pa.Table, SearchSummary]:
    """Search, on owners unless a runner is named; `on_block` is called with the number of finished blocks."""
    finished: list[int] = []

    def note(summary: SearchSummary) -> None:
        finished.append(summary.queries)
        on_block(len(finished))

    chosen = {"block": BLOCK, "runner": "ray", "placement": "owners", **settings}
    summary = search(build(SearchConfig, {"run": chosen, "search": find}), gallery, str(queries), str(out), note)
    return pq.read_table(out), summary


def run_here(gallery: str, queries: Path, out: Path, find: dict[str, Any] = FIND) -> pa.Table:
    return run(gallery, queries, out, find=find, runner="inline", placement="auto")[0]


def list_owners(nodes: Cluster) -> list[Any]:
    return [process for node in nodes.nodes if node.alive for process, title in node.workers() if "LazyOwner" in title]


def test_owners_need_ray(gallery: str, queries: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.placement=owners needs run\.runner=ray"):
        run(gallery, queries, tmp_path / "out.parquet", runner="inline")


@pytest.mark.slow
@pytest.mark.parametrize("find", [FIND, {"path": "scan", "k": 3}, {"path": "lists", "radius": 0.45}])
def test_answers_on_three_nodes(
    find: dict[str, Any], nodes: Cluster, gallery: str, queries: Path, tmp_path: Path
) -> None:
    expected = run_here(gallery, queries, tmp_path / "here.parquet", find)
    counted: list[int] = []
    table, summary = run(
        gallery, queries, tmp_path / "out.parquet", lambda n: counted.append(len(list_owners(nodes))), find=find
    )
    assert table.equals(expected)
    assert summary.placement == "owners"
    assert max(counted) == 3, "an owner per node"


@pytest.mark.slow
def test_owners_and_nodes_are_killed(nodes: Cluster, gallery: str, queries: Path, tmp_path: Path) -> None:
    expected = run_here(gallery, queries, tmp_path / "here.parquet")

    def interfere(block: int) -> None:
        if block == 1:
            list_owners(nodes)[0].kill()
        elif block == 4:
            nodes.nodes[-1].kill()

    table, summary = run(gallery, queries, tmp_path / "out.parquet", interfere)
    assert table.equals(expected)
    assert (summary.queries, summary.blocks) == (8 * BLOCK, 8)
    assert sum(node.alive for node in nodes.nodes) == 2


@pytest.mark.slow
def test_owners_that_end_again_and_again_end_the_search(
    nodes: Cluster, gallery: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Weak(owners.LazyOwner):
        def choose_lists(self, queries: Any, nprobe: int) -> Any:
            os._exit(1)

    monkeypatch.setattr(owners, "OWNER_CLASS", Weak)
    with pytest.raises(WorkerError, match="lost 4 times without a finished block"):
        run(gallery, queries, tmp_path / "out.parquet")
    monkeypatch.undo()
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    assert not list_owners(nodes)
    # The same command resumes.
    table, _ = run(gallery, queries, tmp_path / "out.parquet")
    assert table.equals(run_here(gallery, queries, tmp_path / "here.parquet"))


@pytest.mark.slow
def test_answers_are_of_one_version_and_without_who_is_erased(
    nodes: Cluster, gallery: str, queries: Path, tmp_path: Path
) -> None:
    import shutil

    changing = str(tmp_path / "g")
    shutil.copytree(gallery, changing)
    expected = run_here(gallery, queries, tmp_path / "here.parquet")
    more = Faces().draw(np.arange(100), 5)

    def update(block: int) -> None:
        if block == 2:
            append(Gallery(changing), [rows(np.arange(100), more, 10**6)], "second")
            index(IndexConfig(), changing)
            list_owners(nodes)[0].kill()  # another one opens the version that the search began with

    table, _ = run(changing, queries, tmp_path / "out.parquet", update)
    assert table.drop_columns(["uri"]).equals(expected.drop_columns(["uri"]))
    gone = table["identity"].to_pylist()[-1]
    erased_at: list[int] = []

    def remove(block: int) -> None:
        if block == 1:
            erase.run(Selection(identities=(gone,)), changing)
            erased_at.append(block)

    try:
        table, _ = run(changing, queries, tmp_path / "after.parquet", remove)
    except IndexReplacedError:
        table, _ = run(changing, queries, tmp_path / "after.parquet")
    assert erased_at == [1]
    # Three blocks are in work at a time.
    assert gone not in table["identity"].to_pylist()[5 * BLOCK * 5 :]


@pytest.mark.slow
def test_a_gallery_in_an_object_store(
    bucket: Any, gallery: str, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Owners fetch their shares, and the answers are written by this process."""
    for path in Path(gallery).rglob("*"):
        if path.is_file():
            storage.write_file(f"s3://faces/g/{path.relative_to(gallery)}", str(path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    table, summary = run("s3://faces/g", queries, tmp_path / "out.parquet", owners=2)
    assert table.equals(run_here(gallery, queries, tmp_path / "here.parquet"))
    assert summary.placement == "owners"
