"""Duplicates by partition: the tables are those of the whole, for any number of partitions and any order of tasks."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facepipe.curation.duplicates import DuplicateRule, find_copies, find_duplicates
from facepipe.curation.duplicates.hashes import make_variants
from facepipe.curation.duplicates.images import rank_images
from facepipe.curation.duplicates.partitioned import (
    CopySearch,
    CopySource,
    find_copies_by_partition,
    find_duplicates_by_partition,
)
from facepipe.curation.duplicates.partitioned.describe import hash_contents
from facepipe.curation.duplicates.stars import add_stars
from facepipe.decisions.persons import DecidedFaces
from facepipe.hashing import hash64_column
from facepipe.nearest.distances import compute_pair_distances
from facepipe.nearest.similarity import Pairs
from facepipe.storage.partitions import Tables, TableTask

SCHEMA = pa.schema(
    [
        *(("face_id", pa.int64()), ("image_id", pa.string()), ("uri", pa.string()), ("source", pa.string())),
        *(("identity", pa.string()), ("image_hash", pa.int64()), ("width", pa.int32()), ("height", pa.int32())),
        *(("face_index", pa.int16()), ("sharpness", pa.float32()), ("face_px", pa.float32())),
        *(("ingested_at", pa.timestamp("us", "UTC")), ("file_size", pa.int64()), ("side", pa.int8())),
        ("node", pa.int64()),
    ]
)
DIMENSIONS = 8


def draw_rows(rng: np.random.Generator, images: int, sides: int) -> pa.Table:
    """Draw images of 0 to 3 faces each: many are copies of others by bytes, hash or face, in any combination."""
    hashes = rng.integers(-(1 << 62), 1 << 62, max(2, images // 4))
    rows: list[dict[str, Any]] = []
    for image in range(images):
        side = int(rng.integers(0, sides))
        value = int(rng.choice(hashes))
        if rng.random() < 0.2:
            value = int(rng.choice(np.array(make_variants(np.array([value])))[:, 0]))
        for _ in range(int(rng.integers(0, 3))):
            value ^= 1 << int(rng.integers(0, 62))
        shared: dict[str, Any] = {
            "image_id": [None, f"{rng.integers(0, images // 2):032x}", f"other {rng.integers(0, 3)}"][
                int(rng.choice(3, p=[0.1, 0.8, 0.1]))
            ],
            "uri": f"/{'äab'[rng.integers(0, 3)]}/{image}.jpg",
            "source": "s",
            "image_hash": None if rng.random() < 0.1 else value,
            "width": None if rng.random() < 0.05 else int(rng.integers(1, 4)) * 100,
            "height": 200,
            "sharpness": [None, float("nan"), 1.0, 2.0][rng.integers(0, 4)],
            "ingested_at": int(rng.integers(0, 3)),
            "file_size": [None, 1000, 2000][rng.integers(0, 3)],
            "side": side,
        }
        faces = int(rng.choice(4, p=[0.3, 0.5, 0.15, 0.05]))
        for index in range(max(1, faces)):
            own = {
                "face_id": len(rows) + 1 if faces else None,
                "identity": [None, "Ann", "Ben"][rng.integers(0, 3)],
                "face_index": index,
                "face_px": float(rng.integers(1, 4)) if faces else None,
                "node": -1,
            }
            rows.append({**shared, **own})
    # The images of the other gallery may have the same uris.
    table = pa.Table.from_pylist(rows, SCHEMA)
    return table.take(pa.array(rng.permutation(len(rows))))


class Case:
    """A gallery, or two, with edges."""

    def __init__(self, seed: int, images: int, sides: int, max_neighbours: int):
        rng = np.random.default_rng(seed)
        table = draw_rows(rng, images, sides)
        rows = np.flatnonzero(np.asarray(table["face_id"].is_valid()) & (rng.random(table.num_rows) < 0.95))
        node = np.full(table.num_rows, -1)
        node[rows] = rng.permutation(len(rows))
        self.table = table.set_column(table.schema.get_field_index("node"), "node", pa.array(node))
        self.row_of_node = np.zeros(len(rows), np.int64)
        self.row_of_node[node[rows]] = rows
        # A few pictures of faces, and their copies.
        kinds = rng.normal(size=(max(1, len(rows) // 5), DIMENSIONS))
        vectors = kinds[rng.integers(0, len(kinds), len(rows))] + rng.normal(0, 0.05, (len(rows), DIMENSIONS))
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1)[:, None]).astype(np.float32)
        u, v = np.triu_indices(len(rows), 1)
        distance = np.linalg.norm(self.vectors[u] - self.vectors[v], axis=1).astype(np.float32)
        near = (distance < 0.4) & (rng.random(len(u)) < 0.8)
        self.edges = Pairs(u[near], v[near], distance[near])
        self.max_neighbours = max_neighbours
        ids = table["face_id"].drop_null().to_numpy()
        chosen = np.sort(rng.choice(ids, len(ids) // 5, replace=False)) if len(ids) else ids
        decided = DecidedFaces(kept=chosen[::3], ignored=chosen[1::3])
        self.decided = [decided, DecidedFaces()][:sides]
        self.side_count = len(set(table["side"].to_pylist()))

    def make_source(self, batch: int) -> CopySource:
        def read_faces() -> Iterator[pa.Table]:
            for at in range(0, max(1, self.table.num_rows), batch):
                yield self.table.slice(at, batch)

        def read_edges() -> Iterator[Pairs]:
            for at in range(0, len(self.edges), batch):
                yield self.edges.take(np.arange(at, min(at + batch, len(self.edges))))

        return CopySource(read_faces, lambda: [self.table["uri"]], read_edges, self.vectors)

    def make_search(self, rule: DuplicateRule) -> CopySearch:
        return CopySearch(rule, self.decided, self.side_count, self.max_neighbours)

    def measure(self, u: Any, v: Any) -> Any:
        node = self.table["node"].to_numpy()
        distance = np.sqrt(compute_pair_distances(self.vectors, node[u], self.vectors, node[v]))
        return np.where((node[u] >= 0) & (node[v] >= 0), distance, np.inf)

    def find_near(self, rule: DuplicateRule) -> Pairs:
        """Find the near nodes as `find_face_pairs` does."""
        near = self.edges.take(self.edges.distance <= rule.radius)
        rank = rank_images(self.table, rule.keep, self.decided).of_face[self.row_of_node]
        return add_stars(near, rank, self.vectors.__getitem__, self.max_neighbours, radius=rule.radius)


def shuffle(function: Callable[[TableTask, Any], Tables], tasks: Iterable[TableTask], shared: Any) -> Any:
    """Run tasks in a random order, as a cluster does."""
    order = list(tasks)
    random.Random(0).shuffle(order)
    return [(task.number, function(task, shared)) for task in order]


@pytest.mark.parametrize("partitions", [1, 2, 4, 16])
@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 1 << 30),
    images=st.integers(4, 60),
    sides=st.integers(1, 2),
    neighbours=st.integers(1, 40),
    keep=st.sampled_from(["largest", "sharpest", "oldest"]),
    drop=st.sampled_from(["exact", "near", "same_shot"]),
)
def test_the_tables_are_those_of_the_whole(
    partitions: int,
    seed: int,
    images: int,
    sides: int,
    neighbours: int,
    keep: Literal["largest", "sharpest", "oldest"],
    drop: Literal["exact", "near", "same_shot"],
) -> None:
    case = Case(seed, images, sides, neighbours)
    rule = DuplicateRule(keep=keep, drop=drop)
    near = case.find_near(rule)
    ends = np.sort(np.stack([case.row_of_node[near.u], case.row_of_node[near.v]]), axis=0)
    edges = Pairs(ends[0], ends[1], near.distance)
    images_ranked = rank_images(case.table, keep, case.decided)
    expected = find_duplicates(case.table, edges, rule, case.measure, images_ranked)
    found = find_duplicates_by_partition(case.make_source(7), case.make_search(rule), shuffle, partitions=partitions)
    assert found.pairs.to_pylist() == expected.pairs.to_pylist()
    assert found.groups.to_pylist() == expected.groups.to_pylist()
    assert found.decisions.to_pylist() == expected.decisions.to_pylist()
    assert found.decisions.schema == expected.decisions.schema


@pytest.mark.parametrize("partitions", [1, 2, 4, 16])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 1 << 30), images=st.integers(4, 60), neighbours=st.integers(1, 40))
def test_copies_of_nodes_are_those_of_the_whole(partitions: int, seed: int, images: int, neighbours: int) -> None:
    case = Case(seed, images, 1, neighbours)
    rule = DuplicateRule()
    near = case.find_near(rule)
    ends = np.sort(np.stack([case.row_of_node[near.u], case.row_of_node[near.v]]), axis=0)
    ranked = rank_images(case.table, rule.keep, case.decided)
    leader = find_copies(ranked, case.table, Pairs(ends[0], ends[1], near.distance), rule).groups.kept
    search = replace(case.make_search(rule), with_squashed=False)
    found = find_copies_by_partition(case.make_source(7), search, shuffle, partitions=partitions)
    uri = np.array(case.table["uri"].to_pylist(), object)
    image = ranked.of_face[case.row_of_node]
    # Images have other numbers, so that they are compared by name.
    name_of_rank = uri[ranked.row]
    name_of_number = np.sort(name_of_rank)
    assert (name_of_number[found.image] == name_of_rank[image]).all()
    assert (name_of_number[found.group] == name_of_rank[leader[image]]).all()
    for group in np.unique(found.group):
        members = found.group == group
        order = np.argsort(found.rank[members], kind="stable")
        assert (np.diff(image[members][order]) >= 0).all()
    is_copy = (leader[image[near.u]] == leader[image[near.v]]) & (image[near.u] != image[near.v])
    expected = near.take(is_copy)
    assert sorted(zip(*(getattr(found.pairs, n).tolist() for n in ("u", "v", "distance")), strict=True)) == sorted(
        zip(*(getattr(expected, n).tolist() for n in ("u", "v", "distance")), strict=True)
    )


def test_contents_are_hashed_by_what_they_are_whatever_is_beside_them() -> None:
    usual = [f"{n:032x}" for n in range(50)]
    column = pa.chunked_array([["x", *usual[:20], None], ["", *usual[20:], "ä" * 16]])
    hashes, is_known = hash_contents(column)
    assert is_known.tolist() == [text is not None for text in column.to_pylist()]
    assert len(set(hashes[is_known].tolist())) == len(usual) + 3
    alone, _ = hash_contents(pa.chunked_array([usual[7:9]]))
    assert alone.tolist() == hashes[8:10].tolist()
    assert hashes[0] == hash64_column(pa.array(["x"]))[0]
