"""The library as a program uses it: any way to give an image is the same, and results say what they are."""

import itertools
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import draw
from hypothesis import given, settings
from hypothesis import strategies as st

import facepipe
from facepipe.config import build
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.index.search import Index
from facepipe.sources import SourceConfig
from facepipe.stages import Decode, Detect, Embed, Read
from pipelines import index
from pipelines.embed import EmbedConfig, RunConfig, run

DETECT = Detect(model="fake-detector")
EMBED = Embed(model="fake-embedder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two persons, one without a face, and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for n in range(6):
        cv2.imwrite(str(folder / f"{n}.png"), draw(n, 48))
    cv2.imwrite(str(folder / "6.png"), np.zeros((40, 40, 3), np.uint8))
    (folder / "7.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def gallery(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("galleries") / "g")
    settings = {"source": {"uri": str(folder)}, "run": {"runner": "inline"}}
    models = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    run(build(EmbedConfig, models, settings), path)
    index.run(index.IndexConfig(), path)
    return path


def flatten(results: list[facepipe.Encoded]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    return [
        (result.status, [(face.box.tolist(), face.det_score, face.embedding.tolist()) for face in result.faces])
        for result in results
    ]


def give(path: Path, kind: str) -> Any:
    """Give an image as a path, as text, as the content of its file, or as pixels."""
    if kind == "pixels" and path.suffix == ".png":
        return np.asarray(cv2.imread(str(path)))[..., ::-1]
    return {"path": path, "text": str(path), "bytes": path.read_bytes(), "pixels": path}[kind]


@settings(max_examples=15, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(0, 7), st.sampled_from(["path", "text", "bytes", "pixels"])), max_size=9),
    batch=st.integers(1, 4),
)
def test_however_an_image_is_given_its_faces_are_the_same(
    images: list[tuple[int, str]], batch: int, folder: Path
) -> None:
    paths = sorted(folder.iterdir())
    alone = flatten(facepipe.encode(paths, DETECT, EMBED))
    given_images = [give(paths[n], kind) for n, kind in images]
    assert flatten(facepipe.encode(given_images, DETECT, EMBED, batch)) == [alone[n] for n, _ in images]


def test_one_image_is_a_list_of_one(folder: Path) -> None:
    path = folder / "0.png"
    expected = flatten(facepipe.encode([path], DETECT, EMBED))
    for kind in ("path", "text", "bytes", "pixels"):
        assert flatten(facepipe.encode(give(path, kind), DETECT, EMBED)) == expected


@pytest.mark.parametrize("image", [123, None, 1.5, ("a.jpg",), [b"x"]])
def test_what_is_no_image_is_named(image: object) -> None:
    with pytest.raises(ConfigError, match=f"not {type(image).__name__}$"):
        facepipe.encode([image], DETECT, EMBED)  # type: ignore[list-item]


def test_the_library_gives_what_the_command_stores(folder: Path, gallery: str) -> None:
    frame = Gallery(gallery).to_pandas(["uri", "status", "box", "det_score", "embedding"])
    paths = sorted(folder.iterdir())
    for path, result in zip(paths, facepipe.encode(paths, DETECT, EMBED), strict=True):
        rows = frame[frame["uri"] == str(path)]
        assert set(rows["status"]) == {result.status}
        stored = rows[rows["box"].notna()]
        assert [face.box.tolist() for face in result.faces] == [list(box) for box in stored["box"]]
        for face, vector in zip(result.faces, stored["embedding"], strict=True):
            np.testing.assert_array_equal(face.embedding, np.asarray(vector, np.float32))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that the decoder reduces: JPEGs of up to 2,000 pixels, a PNG, and a file that is cut off."""
    folder = tmp_path_factory.mktemp("large")
    for n, side in enumerate((2000, 1500, 700)):
        image = cv2.resize(draw(n + 4), (side, side - 100 * n), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(folder / f"{n}.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 60 + 10 * n])
    cv2.imwrite(str(folder / "3.png"), cv2.resize(draw(5), (900, 800)))
    data = (folder / "0.jpg").read_bytes()
    (folder / "4.jpg").write_bytes(data[: len(data) // 2])
    return folder


@settings(max_examples=8)
@given(
    size=st.sampled_from([320, 640, 1280]),
    working_side=st.sampled_from([200, 640, 1600]),
    max_pixels=st.sampled_from([2_000_000, 250_000_000]),
    max_bytes=st.sampled_from([10_000, 1 << 28]),
    flip=st.booleans(),
    batch=st.integers(1, 5),
    in_table=st.booleans(),
)
def test_the_library_gives_what_the_command_stores_with_any_settings(
    size: int,
    working_side: int,
    max_pixels: int,
    max_bytes: int,
    flip: bool,
    batch: int,
    in_table: bool,
    large: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Whether the command reads files or a table of their contents; with every option of reading and decoding."""
    paths = sorted(large.iterdir())
    contents = [path.read_bytes() for path in paths]
    folder = tmp_path_factory.mktemp("same")
    source = large
    if in_table:
        source = folder / "images.parquet"
        pq.write_table(pa.table({"bytes": contents, "uri": [path.name for path in paths]}), source)
    detect = Detect(model="fake-detector", size=size)
    embed = Embed(model="fake-embedder", flip=flip)
    decode = Decode(working_side=working_side, max_pixels=max_pixels)
    read = Read(max_bytes=max_bytes)
    config = EmbedConfig(
        SourceConfig(str(source)), read=read, decode=decode, detect=detect, embed=embed, run=RunConfig("inline")
    )
    run(config, str(folder / "g"))
    frame = Gallery(str(folder / "g")).to_pandas(["uri", "status", "error", "face_index", "box", "embedding"])
    results = facepipe.encode(paths, detect, embed, batch, read=read, decode=decode)
    for path, result in zip(paths, results, strict=True):
        rows = frame[frame["uri"].str.endswith(path.name)].sort_values("face_index")
        assert set(rows["status"]) == {result.status}
        assert set(rows["error"].dropna()) == {result.error} - {None}
        stored = rows[rows["box"].notna()]
        assert [face.box.tolist() for face in result.faces] == [list(box) for box in stored["box"]]
        assert [face.embedding.tolist() for face in result.faces] == [list(v) for v in stored["embedding"]]
    if max_bytes > max(map(len, contents)):
        assert flatten(facepipe.encode(contents, detect, embed, batch, decode=decode)) == flatten(results)


def test_what_is_opened_says_what_it_is(gallery: str) -> None:
    opened = Gallery(gallery)
    assert repr(opened) == f"Gallery({opened.path!r}, version=1, models=fake-detector + fake-embedder)"
    searched = Index(gallery)
    assert repr(searched) == f"Index({gallery!r}, {searched.live} faces in 1 shards)"
    ids, vectors = opened.vectors()
    hits = searched.search(vectors, k=2)
    assert repr(hits) == f"Hits({len(ids)} queries, the 2 nearest faces of each: .ids and .distances)"


def test_hits_lead_to_names(gallery: str) -> None:
    opened = Gallery(gallery)
    names = dict(opened.to_pandas(["face_id", "uri"], "face_id is not null").itertuples(index=False))
    ids, vectors = opened.vectors()
    searched = Index(gallery)
    hits = searched.search(vectors, k=3)
    frame = searched.to_pandas(hits)
    assert list(frame.columns) == ["query", "rank", "face_id", "distance", "uri", "identity"]
    expected = [
        (query, rank + 1, hits.ids[query, rank], hits.distances[query, rank], names[hits.ids[query, rank]])
        for query, rank in itertools.product(range(len(ids)), range(3))
    ]
    assert list(frame.drop(columns="identity").itertuples(index=False, name=None)) == expected
    hits.ids[0, 1:] = -1
    assert len(searched.to_pandas(hits)) == 3 * len(ids) - 2
