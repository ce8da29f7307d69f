"""Ray nodes that see none of the driver's folders, some of which are killed, and a gallery in an object store.

Reports and answers are those of one process and a gallery on a disk, to the bit. What a killed node costs is the tasks
that it had. What cannot work without a folder in common is refused before anything is done.
"""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, make_labelled_rows
from conftest import describe_store
from helpers import embed
from ray_nodes import Cluster, Node, can_hide_folders, cluster

from facepipe import storage
from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.errors import WorkerError
from facepipe.gallery import Gallery
from pipelines import clean
from pipelines.cluster import pipeline as cluster_pipeline
from pipelines.dedup import pipeline as dedup
from pipelines.index import IndexConfig
from pipelines.index import run as build_index
from pipelines.runtime.runners import ray as ray_runner
from pipelines.search import SearchConfig
from pipelines.search import run as search

pytestmark = pytest.mark.slow

FACES = 3000
REMOTE = "s3://faces/g"
COMMANDS: dict[str, Callable[[Any, str], Any]] = {
    "cluster": lambda settings, gallery: cluster_pipeline.run(
        build(cluster_pipeline.ClusterConfig, {"run": settings}), gallery
    ),
    "clean": lambda settings, gallery: clean.run(build(clean.CleanConfig, {"run": settings}), gallery),
    "dedup": lambda settings, gallery: dedup.run(build(dedup.DedupConfig, {"run": settings}), gallery),
}
# Of what a report holds, these name the place of the gallery, or the minute in which they were made.
LEFT_OUT = {"report.html", "facepipe.json"}


@pytest.fixture(scope="module", autouse=True)
def small_tasks() -> Iterator[None]:
    """Cut the work of few faces into many tasks, for one process as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("facepipe.curation.graph.cells.MAX_EXACT_FACES", 500)
        patch.setattr("facepipe.curation.graph.build._PAIRS_PER_TASK", 1e5)
        patch.setattr("facepipe.curation.graph.linkage._MAX_NODES_PER_TASK", 100)
        patch.setattr("facepipe.storage.partitions.ROWS_PER_PARTITION", 150)
        patch.setattr("pipelines.graph._MIN_SHARED_COMPARISONS", 0)
        patch.setattr("pipelines.graph.ASSIGNED_ROWS", 500)
        # As in large galleries, the rows of a task are a multiple of those of a block.
        patch.setattr("facepipe.curation.graph.cohort._BLOCK_ROWS", 500)
        yield


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory, small_tasks: None) -> Path:
    """A gallery on a disk, with the reports that one process makes of it."""
    path = tmp_path_factory.mktemp("reports") / "g"
    (table,) = make_labelled_rows(FACES, 10)
    append(Gallery.create(str(path), CONTRACT), [table.slice(at, 500) for at in range(0, FACES, 500)], "first")
    for run in COMMANDS.values():
        run({"runner": "inline"}, str(path))
    build_index(build(IndexConfig, {"index": {"factory": "IVF32,PQ64x4fs", "shard_vectors": 500}}), str(path))
    return path


@pytest.fixture(scope="module")
def queries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries on a disk that the nodes do not see."""
    path = tmp_path_factory.mktemp("queries") / "q.parquet"
    vectors = Faces().draw(np.arange(320) % 200, 10**9)
    pq.write_table(pa.table({"embedding": to_float_lists(vectors)}), path, row_group_size=40)
    return path


@pytest.fixture(scope="module")
def shared_nodes(tmp_path_factory: pytest.TempPathFactory, s3_server: str) -> Iterator[Cluster]:
    """Two nodes with a CPU, and the driver's without one. The two see no folder of these tests, but the store."""
    if not can_hide_folders():
        pytest.skip("needs a kernel that lets this process mount a folder for its children alone")
    hidden = str(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FACEPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))  # an empty one for each node
        for name, value in describe_store(s3_server).items():
            patch.setenv(name, value)
        with cluster((0, 1, 1), hidden=(hidden,)) as made:
            yield made
    assert not made.processes()


@pytest.fixture
def remote(shared_nodes: Cluster, gallery: Path, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The gallery in a store, without reports."""
    shared_nodes.refill()
    for path in gallery.rglob("*"):
        if path.is_file() and "reports" not in path.parts:
            storage.write_file(f"{REMOTE}/{path.relative_to(gallery)}", str(path))
    for name, value in shared_nodes.environment.items():
        monkeypatch.setenv(name, value)
    # Temporary files of the driver are hidden from the nodes too.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return REMOTE


@dataclass
class Attempts:
    """Tasks as they begin on the nodes: by function, call and number, the nodes that began them in turn.

    Attributes:
        nodes: The cluster.
        victims: Functions, of whose first task each the node is killed.
        folder: What all nodes see.
        killed: Nodes that were killed, by Ray's name of them.
        is_over: Is set when no task will begin any more.
    """

    nodes: Cluster
    victims: tuple[str, ...]
    folder: Path
    killed: dict[str, str] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Note from here on what begins where."""
        run_tasks = ray_runner.run_tasks
        calls = count()
        folder = str(self.folder)

        def run(
            function: Any,
            items: Any,
            cpus: float,
            gpus: float = 0,
            *,
            prepare: Any = lambda item: item,
            shared: Any = None,
        ) -> Any:
            call = next(calls)
            is_victim = function.__name__ in self.victims and function.__name__ not in seen
            seen.add(function.__name__)

            def attempt(numbered: Any, *shared: Any) -> Any:
                import ray

                number, prepared = numbered
                here = f"{os.getpid()} {ray.get_runtime_context().get_node_id()}"
                for attempts in count():
                    with suppress(FileExistsError):
                        path = os.path.join(folder, f"{function.__name__}-{call}-{number}-{attempts}")
                        with open(path, "x") as file:
                            file.write(here)
                        break
                if is_victim and number == 1 and attempts == 0:
                    time.sleep(3600)  # the node is killed meanwhile
                return function(prepared, *shared)

            numbered = zip(count(), items, strict=False)
            results = run_tasks(
                attempt, numbered, cpus, gpus, prepare=lambda pair: (pair[0], prepare(pair[1])), shared=shared
            )
            for (_, item), result in results:
                yield item, result

        seen: set[str] = set()
        monkeypatch.setattr(ray_runner, "run_tasks", run)

    def kill(self) -> None:
        """Kill the node of each victim as soon as it has begun, and start another one."""
        for name in self.victims:
            while not (begun := [path for path in self.folder.glob(f"{name}-*-1-0") if path.stat().st_size]):
                if self.is_over.wait(0.05):
                    return
            pid, node_id = begun[0].read_text().split()
            self._find_node(int(pid)).kill()
            self.killed[name] = node_id
            self.nodes.refill()

    def _find_node(self, pid: int) -> Node:
        alive = [node for node in self.nodes.nodes if node.alive]
        return next(node for node in alive if pid in {process.pid for process in node.family()})

    def list_tasks(self) -> dict[str, list[list[str]]]:
        """By function, per task the nodes that began it in turn."""
        begun: dict[tuple[str, str, str], dict[int, str]] = {}
        for path in self.folder.iterdir():
            function, call, number, attempt = path.name.rsplit("-", 3)
            begun.setdefault((function, call, number), {})[int(attempt)] = path.read_text().split()[1]
        tasks: dict[str, list[list[str]]] = {}
        for (function, _, _), attempts in begun.items():
            tasks.setdefault(function, []).append([attempts[n] for n in sorted(attempts)])
        return tasks


def read_local(gallery: Path, name: str) -> dict[str, bytes]:
    folder = gallery / "reports" / name
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in LEFT_OUT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_remote(bucket: Any, name: str) -> dict[str, bytes]:
    prefix = f"g/reports/{name}/"
    keys = (entry["Key"] for entry in bucket.list_objects_v2(Bucket="faces", Prefix=prefix)["Contents"])
    return {
        key.removeprefix(prefix): bucket.get_object(Bucket="faces", Key=key)["Body"].read()
        for key in keys
        if key.rsplit("/", 1)[1] not in LEFT_OUT
    }


@pytest.mark.parametrize(
    ("name", "victims"),
    [
        ("cluster", ("compute_block_density", "assign_block", "join_packed_cells", "run_linkage_task")),
        ("clean", ("join_packed_cells", "find_component_copies")),
        ("dedup", ("describe_images", "judge_components")),
    ],
)
def test_reports_are_those_of_one_process(
    name: str,
    victims: tuple[str, ...],
    shared_nodes: Cluster,
    remote: str,
    gallery: Path,
    bucket: Any,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir=shared_nodes.folder) as folder:
        attempts = Attempts(shared_nodes, victims, Path(folder))
        attempts.watch(monkeypatch)
        killer = threading.Thread(target=attempts.kill, daemon=True)
        killer.start()
        try:
            COMMANDS[name]({"runner": "ray", "cpus": 1}, remote)
        finally:
            attempts.is_over.set()
            killer.join()
        tasks = attempts.list_tasks()
    found = read_remote(bucket, name)
    expected = read_local(gallery, name)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []
    # Each task that was begun again was of a killed node.
    assert attempts.killed.keys() == set(victims)
    again = {function: [nodes for nodes in begun if len(nodes) > 1] for function, begun in tasks.items()}
    print({function: (len(tasks[function]), len(nodes)) for function, nodes in again.items()})
    for function, repeated in again.items():
        assert {node for nodes in repeated for node in nodes[:-1]} <= set(attempts.killed.values()), function
        assert len(tasks[function]) > 1
    assert {function for function, repeated in again.items() if repeated} >= set(victims)


@pytest.mark.parametrize("placement", ["copies", "owners", "auto"])
def test_answers_are_those_of_one_process(
    placement: str, shared_nodes: Cluster, remote: str, gallery: Path, queries: Path, tmp_path: Path
) -> None:
    """Queries and answers are on the driver's disk alone."""

    def run(path: str, name: str, **settings: Any) -> pa.Table:
        out = tmp_path / f"{name}.parquet"
        config = build(SearchConfig, {"search": {"path": "lists"}, "run": {"block": 40, **settings}})
        search(config, path, str(queries), str(out))
        return pq.read_table(out)

    expected = run(str(gallery), "here", runner="inline")
    assert run(remote, "there", runner="ray", cpus=1, placement=placement).equals(expected)


@pytest.mark.parametrize("placement", ["copies", "owners"])
def test_a_search_of_what_nodes_do_not_see_is_refused(
    placement: str, shared_nodes: Cluster, remote: str, gallery: Path, queries: Path, tmp_path: Path
) -> None:
    config = build(SearchConfig, {"run": {"runner": "ray", "cpus": 1, "placement": placement}})
    with pytest.raises(WorkerError, match=r"2 of 2 nodes of Ray do not see the gallery .*Mount its folder"):
        search(config, str(gallery), str(queries), str(tmp_path / "out.parquet"))
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("is_source_seen", [True, False])
def test_images_that_nodes_do_not_see_are_not_embedded(
    is_source_seen: bool, shared_nodes: Cluster, remote: str, fakes: dict[str, Any], drawings: Path, tmp_path: Path
) -> None:
    """A worker would take each for one that cannot be read, or write its part where nobody finds it."""
    with tempfile.TemporaryDirectory(dir=shared_nodes.folder) as seen:
        source = shutil.copytree(drawings, Path(seen) / "drawings") if is_source_seen else drawings
        what = "the folder that workers write to" if is_source_seen else "the source"
        with pytest.raises(WorkerError, match=f"2 of 2 nodes of Ray do not see {what}"):
            embed(source, tmp_path / "g", fakes, runner="ray")
    assert Gallery(str(tmp_path / "g")).counts()["images"] == 0
