"""Three nodes of a Ray cluster, one of which dies in the middle of the work: the result is the one of a quiet run."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append
from bench.galleries import rows as gallery_rows
from bench.nodes import committed, listing, make_corpus, start, working
from helpers import embed, rows
from ray_nodes import Cluster, Node, cluster

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.errors import SourceError
from facepipe.gallery import Gallery
from facepipe.gallery.maintenance.verify import verify_gallery
from facepipe.index import manifest
from facepipe.index.verify import verify_index
from facepipe.schema import WORK_ITEM
from facepipe.sources.blocks import Block
from pipelines.index import IndexConfig
from pipelines.index import run as build_index
from pipelines.runtime.plan import Resources, make_plan
from pipelines.runtime.runners.ray import RepeatableListing
from pipelines.search import SearchConfig
from pipelines.search import run as search

pytestmark = pytest.mark.slow

IMAGES, FACES, FILE = 960, 24_000, 2000
LIMIT = 300


@pytest.fixture(scope="module")
def shared_nodes() -> Iterator[Cluster]:
    with cluster() as made:
        yield made
    assert not made.processes()


@pytest.fixture
def nodes(shared_nodes: Cluster) -> Cluster:
    """Three nodes; those that a test has killed are replaced."""
    shared_nodes.refill()
    return shared_nodes


def wait_for(happens: Callable[[], Any], driver: "subprocess.Popen[bytes]") -> Any:
    """What `happens` gives as soon as that is something; the driver must not have ended before."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if found := happens():
            return found
        assert driver.poll() is None, "ended too soon"
        time.sleep(0.05)
    raise TimeoutError


def begin(nodes: Cluster, *arguments: str) -> "subprocess.Popen[bytes]":
    line, out = [sys.executable, "-m", "jobs.cli", *arguments], subprocess.DEVNULL
    return subprocess.Popen(line, stdout=out, stderr=out, env=nodes.environment)


def test_embed(nodes: Cluster, fakes: dict[str, dict[str, object]], tmp_path: Path) -> None:
    """First the process that lists the source is killed, then a whole node."""
    corpus = make_corpus(tmp_path / "corpus", IMAGES, side=640)
    embed(corpus, tmp_path / "inline", fakes)
    gallery = tmp_path / "g"
    driver = start(corpus, gallery, nodes)
    at_work = set[int]()

    def busy() -> bool:
        at_work.update(n for n, node in enumerate(nodes.nodes) if working(node))
        return len(at_work) >= 2 and committed(gallery) > 0

    wait_for(busy, driver)
    assert not any(listing(node) for node in nodes.nodes[1:]), "the listing outlives every node but the driver's"
    for process in listing(nodes.nodes[0]):
        process.kill()
    wait_for(lambda: committed(gallery) > IMAGES / 5, driver)
    victim = wait_for(lambda: next((node for node in nodes.nodes[1:] if node.alive and working(node)), None), driver)
    victim.kill()
    assert committed(gallery) < IMAGES
    assert driver.wait(LIMIT) == 0
    assert rows(gallery) == rows(tmp_path / "inline")
    assert verify_gallery(Gallery(str(gallery))).problems == []
    assert not list((gallery / "runs").glob("*/*")), "no marks of crashes are left"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of faces in many files."""
    path = tmp_path_factory.mktemp("faces") / "g"
    identities, vectors = next(iter(Faces().blocks(FACES)))
    made = gallery_rows(identities, vectors, 0)
    append(Gallery.create(str(path), CONTRACT), [made.slice(at, FILE) for at in range(0, FACES, FILE)], "first")
    return path


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("queries") / "q.parquet"
    vectors = Faces().draw(np.arange(300), 10**9)
    pq.write_table(
        pa.table({"query_id": [f"q{n}" for n in range(len(vectors))], "embedding": to_float_lists(vectors)}), path
    )
    return path


def test_index(nodes: Cluster, table: Path, asked: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"index": {"factory": "IVF64,SQ8", "shard_vectors": FILE}}
    build_index(build(IndexConfig, chosen, {"run": {"runner": "inline"}}), str(table))
    search(build(SearchConfig), str(table), str(asked), str(tmp_path / "inline.parquet"))
    settings = [text for key, value in chosen["index"].items() for text in ("--set", f"index.{key}={value}")]
    settings += ["--set", "run.runner=ray", "--set", "run.cpus=2", "--quiet"]  # more CPUs than any node has
    driver = begin(nodes, "index", str(table), "--retrain", *settings)

    def builds() -> Node | None:
        alive = [node for node in nodes.nodes[1:] if node.alive]
        return next((node for node in alive if any("_build" in title for _, title in node.workers())), None)

    wait_for(builds, driver).kill()
    assert driver.wait(LIMIT) == 0
    assert verify_index(Gallery(str(table))) == []
    held = manifest.load(str(table))
    assert len(held.shards) == FACES // FILE
    assert {path.name for path in Path(manifest.open_index_store(str(table)).folder).iterdir()} >= {
        s.name for s in held.shards
    }
    search(build(SearchConfig), str(table), str(asked), str(tmp_path / "ray.parquet"))
    assert pq.read_table(tmp_path / "ray.parquet").equals(pq.read_table(tmp_path / "inline.parquet"))


def listed(*uris: str) -> list[Block]:
    """A block an image."""
    items = [{"uri": uri} for uri in uris]
    return [Block(n, pa.Table.from_pylist([item], schema=WORK_ITEM)) for n, item in enumerate(items)]


def test_listing_anew_goes_on_where_the_source_is_the_same(tmp_path: Path) -> None:
    first = iter(RepeatableListing(lambda: listed("a", "b", "c"), str(tmp_path / "journal"))())
    assert [next(first).number for _ in range(2)] == [0, 1]
    with (tmp_path / "journal").open("ab") as file:
        file.write(b"half")  # the process died while it wrote
    again = RepeatableListing(lambda: listed("a", "b", "c", "d"), str(tmp_path / "journal"))
    assert [block.number for block in again()] == [0, 1, 2, 3]
    assert [block.number for block in again()] == [0, 1, 2, 3]


def test_listing_anew_is_refused_where_blocks_would_be_others(tmp_path: Path) -> None:
    """Else one image would come twice, or never: Ray leaves out as many blocks as it has already."""
    assert len(list(RepeatableListing(lambda: listed("a", "b", "c"), str(tmp_path / "journal"))())) == 3
    for changed in (listed("a", "aa", "b", "c"), listed("b", "c")):
        with pytest.raises(SourceError, match="run the same command again"):
            list(RepeatableListing(lambda: changed, str(tmp_path / "journal"))())  # noqa: B023


def test_no_worker_asks_for_more_cpus_than_the_machine_of_its_gpu_has() -> None:
    """Ray would wait for ever. One machine of 32 CPUs, two of 8 with two GPUs each."""
    cluster_ = Resources(48, 4, cpus_per_gpu=4)
    assert [(g.workers, g.cpus) for g in make_plan(cluster_).groups] == [(4, 4)]
    assert [(g.workers, g.cpus) for g in make_plan(cluster_, workers=1).groups] == [(1, 4)]
    assert [(g.workers, g.cpus) for g in make_plan(cluster_, layout="split").groups] == [(44, 1), (4, 0)]
