"""What a search reads and writes: no output takes the place of anything else, and no query file is read for another."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from helpers import run_facepipe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from facepipe.arrow import to_float_lists
from facepipe.config import build
from facepipe.errors import ConfigError, FacepipeError, SourceError
from facepipe.gallery import Gallery
from facepipe.index.queries import open_queries, read_block
from pipelines import index, search
from pipelines.index import IndexConfig
from pipelines.search import SearchConfig, SearchSummary

COUNT = 40


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("files") / "g")
    faces = Faces().draw(np.arange(COUNT), 0)
    append(Gallery.create(path, CONTRACT), [rows(np.arange(COUNT), faces, 0)], "first")
    index.run(IndexConfig(), path)
    return path


def write_queries(path: Path, first: int, count: int = 5, column: str = "embedding", **more: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = to_float_lists(Faces().draw(np.arange(first, first + count), 0))
    pq.write_table(pa.table({column: vectors, "query_id": [f"q{first + n}" for n in range(count)], **more}), path)
    return path


def run(gallery: str, queries: Path, out: Path, **settings: Any) -> SearchSummary:
    config = build(SearchConfig, {"run": {"runner": "inline", "block": 5, **settings}, "search": {"k": 1}})
    return search.run(config, gallery, str(queries), str(out))


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


Place = Callable[[Path, str], tuple[Path, Path]]


def put_queries(folder: Path, gallery: str) -> tuple[Path, Path]:
    path = write_queries(folder / "q.parquet", 0)
    return path, path


def put_link(folder: Path, gallery: str) -> tuple[Path, Path]:
    path = write_queries(folder / "q.parquet", 0)
    (folder / "out.parquet").symlink_to(path)
    return path, folder / "out.parquet"


def put_hard_link(folder: Path, gallery: str) -> tuple[Path, Path]:
    path = write_queries(folder / "q.parquet", 0)
    os.link(path, folder / "out.parquet")
    return path, folder / "out.parquet"


def put_among_queries(folder: Path, gallery: str) -> tuple[Path, Path]:
    write_queries(folder / "q" / "a.parquet", 0)
    return folder / "q", folder / "q" / "deep" / "out.parquet"


def put_in_place_of_queries(folder: Path, gallery: str) -> tuple[Path, Path]:
    write_queries(folder / "q" / "a.parquet", 0)
    return folder / "q", folder / "q"


def put_other_table(folder: Path, gallery: str) -> tuple[Path, Path]:
    pq.write_table(pa.table({"query_id": ["a"], "distance": [0.1]}), folder / "out.parquet")
    return write_queries(folder / "q.parquet", 0), folder / "out.parquet"


def put_text(folder: Path, gallery: str) -> tuple[Path, Path]:
    (folder / "out.parquet").write_text("notes")
    return write_queries(folder / "q.parquet", 0), folder / "out.parquet"


def put_in_gallery(folder: Path, gallery: str) -> tuple[Path, Path]:
    return write_queries(folder / "q.parquet", 0), Path(gallery, "index", "out.parquet")


@pytest.mark.parametrize(
    "place",
    [
        *(put_queries, put_link, put_hard_link, put_among_queries, put_in_place_of_queries),
        *(put_other_table, put_text, put_in_gallery),
    ],
)
def test_an_output_takes_the_place_of_nothing(place: Place, gallery: str, tmp_path: Path) -> None:
    queries, out = place(tmp_path, gallery)
    before = read_tree(tmp_path), read_tree(Path(gallery, "index"))
    with pytest.raises(ConfigError):
        run(gallery, queries, out)
    assert run_facepipe("search", gallery, queries, out, "--quiet")[0] == 2
    assert (read_tree(tmp_path), read_tree(Path(gallery, "index"))) == before


def test_the_output_of_a_search_is_replaced(gallery: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for first in (0, 7):
        run(gallery, write_queries(tmp_path / "q.parquet", first), out)
        assert pq.read_table(out)["query_id"].to_pylist() == [f"q{first + n}" for n in range(5)]


def test_nothing_is_left_of_a_search_that_is_refused(gallery: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    before = list(tmp_path.rglob("*"))
    with pytest.raises(FacepipeError):
        run(gallery, tmp_path / "photos", tmp_path / "out.parquet")
    assert list(tmp_path.rglob("*")) == before


KINDS = st.sampled_from(["embedding", "vector", "both", "none", "wide", "text", "numbers"])


def write_kind(path: Path, kind: str, first: int) -> None:
    """Write a file of one row; what is odd about it is its column."""
    table = {
        "none": {"embeddings": [[0.1] * 128]},
        "wide": {"embedding": pa.array([[0.1] * 64], pa.list_(pa.float32(), 64))},
        "text": {"embedding": ["0.1 0.2"]},
        "numbers": {"vector": [["0.1"]]},
    }
    if kind == "both":
        write_queries(path, first, 1, vector=[[0.0]])
    elif kind in table:
        pq.write_table(pa.table(table[kind]), path)
    else:
        write_queries(path, first, 1, column=kind)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(KINDS, min_size=1, max_size=4))
def test_an_odd_file_is_named(kinds: list[str], gallery: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("q")
    for n, kind in enumerate(kinds):
        write_kind(folder / f"{n}-{kind}.parquet", kind, n)
    odd = [f"{n}-{kind}.parquet" for n, kind in enumerate(kinds) if kind not in ("embedding", "vector", "both")]
    contract = Gallery(gallery).contract
    if odd:
        with pytest.raises((ConfigError, SourceError)) as caught:
            open_queries(str(folder), contract)
        assert any(name in str(caught.value) for name in odd)
        assert "embedding" in str(caught.value) or "vector" in str(caught.value)
        return
    source = open_queries(str(folder), contract)
    assert source is not None
    # Every file is read by its own column, and a column that is not the usual one is said.
    expected = np.concatenate([Faces().draw(np.arange(n, n + 1), 0) for n in range(len(kinds))])
    found = [part.vectors[0] for block in source.cut_blocks(1) for part in read_block(block, 128)]
    assert np.allclose(found, expected, atol=1e-6)
    assert len(source.notes) == ("vector" in kinds)
    assert all("vector.parquet" in note for note in source.notes)


def test_files_that_are_not_parquet_are_named(gallery: str, tmp_path: Path) -> None:
    for name in ("a.parquet", "c.parquet"):
        write_queries(tmp_path / "q" / name, 0)
    for name in ("0-readme.txt", "b.csv", "_SUCCESS", ".crc"):
        (tmp_path / "q" / name).write_text("x")
    write_queries(tmp_path / "q" / "_temporary" / "d.parquet", 0)
    code, out, err = run_facepipe("search", gallery, tmp_path / "q", tmp_path / "out.parquet", "--quiet")
    assert (code, "0-readme.txt" in err, "1 more" in err) == (0, True, True), err
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 10 * 10
    assert "10" in out


def test_queries_are_those_with_which_a_search_began(gallery: str, tmp_path: Path) -> None:
    """A file comes into the folder, and another one is replaced, while the search runs."""
    for n in range(3):
        write_queries(tmp_path / "q" / f"{n}.parquet", 10 * n)
    config = build(SearchConfig, {"run": {"runner": "inline", "block": 5}, "search": {"k": 1}})

    def add(summary: SearchSummary) -> None:
        write_queries(tmp_path / "q" / "0-more.parquet", 35)

    search.run(config, gallery, str(tmp_path / "q"), str(tmp_path / "out.parquet"), add)
    names = pq.read_table(tmp_path / "out.parquet")["query_id"].to_pylist()
    assert names == [f"q{10 * n + m}" for n in range(3) for m in range(5)]

    def change(summary: SearchSummary) -> None:
        write_queries(tmp_path / "q" / "2.parquet", 33, count=6)

    with pytest.raises(SourceError, match=r"2\.parquet.* has changed"):
        search.run(config, gallery, str(tmp_path / "q"), str(tmp_path / "out2.parquet"), change)
    # The same command searches for what is there now.
    assert run(gallery, tmp_path / "q", tmp_path / "out2.parquet").queries == 5 + 5 + 5 + 6


@pytest.mark.parametrize("names", [[[1]], [{"a": 1}], [b"\xff"], [None], [7]])
def test_a_column_that_names_no_query_is_left_alone(names: list[Any], gallery: str, tmp_path: Path) -> None:
    vectors = to_float_lists(Faces().draw(np.arange(1), 0))
    pq.write_table(pa.table({"embedding": vectors, "query_id": names, "uri": ["u"]}), tmp_path / "q.parquet")
    run(gallery, tmp_path / "q.parquet", tmp_path / "out.parquet")
    (name,) = pq.read_table(tmp_path / "out.parquet")["query_id"].to_pylist()
    assert name in ("7", "0", "u")
