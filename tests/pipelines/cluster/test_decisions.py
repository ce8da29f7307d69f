"""cluster and --assign with what people have decided: it holds exactly, over every run, and persons keep their ids."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bench.galleries import CONTRACT, Faces, append, rows
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from helpers import embed

from facepipe.config import build
from facepipe.curation.clusters.persons import PERSONS
from facepipe.curation.clusters.tables import CLUSTERS, FACES, LEFT_OUT, MERGES
from facepipe.decisions import add_decisions, read_decisions, undo_decisions
from facepipe.decisions.schema import SCHEMA, conform_rows
from facepipe.decisions.table import hold_decisions
from facepipe.erasure.selection import Selection
from facepipe.errors import GalleryError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
from facepipe.index.search import Index
from facepipe.schema import conform
from pipelines import erase
from pipelines.cluster import ClusterConfig, ClusterSummary, run
from pipelines.cluster.assign import run as assign
from pipelines.index import IndexConfig
from pipelines.index import run as build_index
from pipelines.search import SearchConfig
from pipelines.search import run as search

EACH = 5
PERSONS_DRAWN = 24


def cluster(gallery: Gallery, **how: Any) -> ClusterSummary:
    settings = {"graph": {"threshold": 0.42}, "run": {"runner": "inline"}}
    return run(build(ClusterConfig, settings), gallery.path, **how)


def replace_rows(gallery: Gallery, kept: pa.Table) -> Gallery:
    """Rewrite the table with these rows."""
    table = DeltaTable(gallery.faces_folder)
    now = int(time.time() * 1000)
    actions: list[Any] = [RemoveAction(file["path"], True, now) for file in Gallery(gallery.path).files()]
    data = encode_parquet(kept)
    name = f"rewritten-{time.time_ns()}.parquet"
    Path(gallery.faces_folder, name).write_bytes(data)
    actions.append(AddAction(name, len(data), {}, now, True, compute_statistics(kept)))
    table.create_write_transaction(actions, "append", table.schema())
    return Gallery(gallery.path)


def read(gallery: Gallery, name: str) -> pa.Table:
    return pq.read_table(Path(gallery.path, "reports", "cluster", name))


def list_clusters(gallery: Gallery) -> dict[int, int]:
    """The cluster of each face."""
    table = read(gallery, FACES)
    return dict(zip(table["face_id"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def list_persons(gallery: Gallery) -> dict[int, dict[str, Any]]:
    """The persons by cluster; what the table promises."""
    table = read(gallery, PERSONS)
    found = {row["cluster"]: row for row in table.to_pylist() if row["cluster"] is not None}
    sizes = {row["cluster"]: row["size"] for row in read(gallery, CLUSTERS).to_pylist() if row["size"]}
    assert {number: row["size"] for number, row in found.items()} == sizes
    ids = table["person"].to_pylist()
    assert sorted(set(ids)) == ids
    names = table["name"].drop_null().to_pylist()
    assert len(set(names)) == len(names)
    return found


def check_decisions(gallery: Gallery) -> None:
    """No active decision is broken by the tables."""
    clusters = list_clusters(gallery)
    persons = list_persons(gallery)
    decisions = read_decisions(gallery)
    left_out = np.union1d(decisions.ignored, decisions.not_faces)
    names = {number: row["name"] for number, row in persons.items()}
    for face, person in zip(decisions.confirmed.face_id.tolist(), decisions.confirmed.person.to_pylist(), strict=True):
        assert names[clusters[face]] == person
    for face, person in zip(decisions.rejected.face_id.tolist(), decisions.rejected.person.to_pylist(), strict=True):
        assert names[clusters[face]] != person
    for first, second in decisions.same_pairs.tolist():
        assert clusters.get(first, clusters.get(second)) == clusters.get(second, clusters.get(first))
    for first, second in decisions.different_pairs.tolist():
        assert not {first, second} <= set(clusters) or clusters[first] != clusters[second]
    assert not set(clusters) & set(left_out.tolist())
    assert np.array_equal(np.sort(read(gallery, LEFT_OUT)["face_id"].to_numpy()), left_out)


@pytest.fixture(scope="module")
def drawn() -> pa.Table:
    """Rows of 24 persons with 5 faces each, by person."""
    identities = np.repeat(np.arange(PERSONS_DRAWN), EACH)
    return rows(identities, Faces(seed=3).draw(identities, 1), 0)


@pytest.fixture
def gallery(drawn: pa.Table, tmp_path: Path) -> Gallery:
    made = Gallery.create(str(tmp_path / "g"), CONTRACT)
    append(made, [drawn], "first")
    return Gallery(made.path)


@pytest.fixture
def ids(drawn: pa.Table) -> list[list[int]]:
    """Ids of the faces of each person."""
    return np.array(drawn["face_id"].to_pylist()).reshape(PERSONS_DRAWN, EACH).tolist()


def decide(gallery: Gallery, *decided: dict[str, Any]) -> None:
    rows_ = [{name: str(value) for name, value in row.items()} for row in decided]
    assert add_decisions(gallery, rows_, who="tester").is_applied


def test_what_is_said_of_two_faces_holds(gallery: Gallery, ids: list[list[int]]) -> None:
    """Strangers that are one person, a person that is two, names, and faces that are nobody."""
    summary = cluster(gallery)
    assert summary.clusters == PERSONS_DRAWN
    assert read(gallery, PERSONS)["person"].to_pylist() == read(gallery, CLUSTERS)["cluster"].to_pylist()
    decide(
        gallery,
        {"decision": "same_as", "face_id": ids[0][0], "other_face_id": ids[1][0]},
        {"decision": "different_from", "face_id": ids[2][0], "other_face_id": ids[2][1]},
        {"decision": "is", "face_id": ids[3][0], "person": "Ann"},
        {"decision": "is", "face_id": ids[4][0], "person": "Ann"},
        {"decision": "is", "face_id": ids[3][1], "person": "Bob"},
        {"decision": "is_not", "face_id": ids[3][2], "person": "Ann"},
        {"decision": "ignore", "face_id": ids[5][0]},
        {"decision": "not_a_face", "face_id": ids[5][1]},
        {"decision": "keep", "face_id": ids[6][1]},
    )
    summary = cluster(gallery)
    check_decisions(gallery)
    assert (summary.left_out, summary.named, summary.faces) == (2, 2, PERSONS_DRAWN * EACH - 2)
    clusters = list_clusters(gallery)
    assert len({clusters[face] for face in ids[6]}) == 1, "others are as they were"
    # What is decided is not suggested again.
    numbers = {frozenset((clusters[ids[2][0]], clusters[ids[2][1]]))}
    merges = read(gallery, MERGES)
    assert not numbers & {
        frozenset(pair) for pair in zip(merges["left"].to_pylist(), merges["right"].to_pylist(), strict=True)
    }


def test_assign_respects_decisions_of_old_and_new_faces(
    gallery: Gallery, drawn: pa.Table, ids: list[list[int]]
) -> None:
    """The same decisions without a full clustering: some faces move, the numbers of the others stay."""
    decided = [
        {"decision": "same_as", "face_id": ids[0][0], "other_face_id": ids[1][0]},
        {"decision": "different_from", "face_id": ids[2][0], "other_face_id": ids[2][1]},
        {"decision": "is", "face_id": ids[3][0], "person": "Ann"},
        {"decision": "is", "face_id": ids[3][1], "person": "Bob"},
        {"decision": "ignore", "face_id": ids[5][0]},
    ]
    cluster(gallery)
    before = list_clusters(gallery)
    persons = {face: list_persons(gallery)[number]["person"] for face, number in before.items()}
    decide(gallery, *decided)
    summary = assign(gallery.path)
    check_decisions(gallery)
    assert (summary.new, summary.moved, summary.gone) == (0, 3, 1)
    after = list_clusters(gallery)
    assert sum(after.get(face) != number for face, number in before.items()) == 4
    now = {face: list_persons(gallery)[number]["person"] for face, number in after.items()}
    still = [face for face in after if after[face] == before[face]]
    assert all(now[face] == persons[face] for face in still)
    # Nothing has changed since.
    assert assign(gallery.path).moved == 0
    assert list_clusters(gallery) == after
    # New faces of an old person by decision, and one that nobody ignores any more.
    truth = np.array([0, 7, 8, 3])
    more = rows(truth, Faces(seed=3).draw(truth, 9), 5000)
    new = more["face_id"].to_pylist()
    append(gallery, [more], "more")
    opened = Gallery(gallery.path)
    decide(
        opened,
        {"decision": "is", "face_id": new[1], "person": "Ann"},
        {"decision": "different_from", "face_id": new[0], "other_face_id": ids[0][0]},
        {"decision": "is_not", "face_id": new[3], "person": "Ann"},
    )
    rows_ = read_decisions(opened).rows
    undo_decisions(opened, rows_.filter(pc.equal(rows_["decision"], "ignore"))["decision_id"].to_pylist())
    assign(gallery.path)
    check_decisions(opened)
    final = list_clusters(opened)
    assert len(final) == len(before) + 4
    assert final[new[1]] == final[ids[3][0]]


def test_contradictions_are_refused_before_anything_is_built(gallery: Gallery, ids: list[list[int]]) -> None:
    decide(
        gallery,
        {"decision": "same_as", "face_id": ids[0][0], "other_face_id": ids[1][0]},
        {"decision": "same_as", "face_id": ids[1][0], "other_face_id": ids[2][0]},
    )
    contradiction = {
        "decision_id": "f" * 32,
        "decision": "different_from",
        "face_id": ids[0][0],
        "other_face_id": ids[2][0],
    }
    with hold_decisions(gallery.path) as writer:
        writer.append(conform_rows(pa.Table.from_pylist([contradiction], SCHEMA)))
    with pytest.raises(GalleryError, match=r"contradict each other.*--undo"):
        cluster(gallery)
    assert not Path(gallery.path, "reports", "graph").exists()
    undo_decisions(gallery, ["f" * 32])
    cluster(gallery)
    check_decisions(gallery)


def test_copies_part_if_people_say_so(gallery: Gallery, drawn: pa.Table, ids: list[list[int]]) -> None:
    """Two faces with one vector are one person, unless a decision says otherwise; and the copy of an ignored face stays."""
    at = drawn["face_id"].to_pylist().index(ids[0][0])
    copies = drawn.take([at, at])
    numbers = [17, 19]
    copies = copies.set_column(0, "face_id", pa.array(numbers))
    copies = copies.set_column(copies.schema.get_field_index("uri"), "uri", pa.array(["/c/1.jpg", "/c/2.jpg"]))
    copies = copies.set_column(copies.schema.get_field_index("image_id"), "image_id", pa.array(["c" * 32, "d" * 32]))
    append(gallery, [conform(copies)], "copies")
    opened = Gallery(gallery.path)
    cluster(opened)
    assert len({list_clusters(opened)[face] for face in (17, 19, *ids[0])}) == 1
    decide(opened, {"decision": "different_from", "face_id": 17, "other_face_id": ids[0][0]})
    cluster(opened)
    check_decisions(opened)
    assert list_clusters(opened)[19] == list_clusters(opened)[ids[0][1]]
    decide(opened, {"decision": "ignore", "face_id": ids[0][0]})
    cluster(opened)
    check_decisions(opened)
    assert len({list_clusters(opened)[face] for face in (19, *ids[0][1:])}) == 1


def test_names_and_ids_survive_ten_clusterings(gallery: Gallery, drawn: pa.Table) -> None:
    """With 30 % of the faces added and removed in between, every confirmed face keeps its person."""
    everyone = np.array(drawn["face_id"].to_pylist())
    # Names of every third person on two faces, some wrong; strangers parted; strangers that are one.
    named = range(0, PERSONS_DRAWN, 3)
    decided = [
        {"decision": "is", "face_id": int(everyone[n * EACH + k]), "person": f"person {n}"}
        for n in named
        for k in (0, 3)
    ]
    decided += [
        {"decision": "is", "face_id": int(everyone[(n + 1) * EACH]), "person": f"person {n}"} for n in named[:3]
    ]
    for n in range(2, PERSONS_DRAWN, 6):
        first, second, third = everyone[n * EACH : n * EACH + 3].tolist()
        decided.append({"decision": "different_from", "face_id": first, "other_face_id": second})
        decided.append({"decision": "same_as", "face_id": second, "other_face_id": third})
    person_of_name = cluster_ten_times(gallery, drawn, decided, {"graph": {"threshold": 0.42}})
    assert len(person_of_name) == len(named)


def cluster_ten_times(
    gallery: Gallery, drawn: pa.Table, decided: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, int]:
    """Cluster with these decisions, and with other 70 % of the rows each time; check them, and return who has names."""
    decide(gallery, *decided)
    confirmed = {row["face_id"]: row["person"] for row in decided if row["decision"] == "is"}
    person_of_name: dict[str, int] = {}
    opened = gallery
    rng = np.random.default_rng(0)
    rows_with_face = drawn.filter(drawn["face_id"].is_valid())
    everyone = np.array(rows_with_face["face_id"].to_pylist())
    for turn in range(10):
        gone = rng.random(len(everyone)) < 0.3
        opened = replace_rows(opened, conform(rows_with_face.filter(pa.array(~gone))))
        if turn % 3 == 2:
            assign(opened.path)
        else:
            run(build(ClusterConfig, settings, {"run": {"runner": "inline"}}), opened.path)
        present = set(everyone[~gone].tolist())
        clusters = list_clusters(opened)
        assert set(clusters) == present
        persons = list_persons(opened)
        table = read(opened, PERSONS)
        by_name = {row["name"]: row["person"] for row in table.to_pylist() if row["name"]}
        for face, name in confirmed.items():
            if face in present:
                row = persons[clusters[face]]
                assert row["name"] == name
                assert person_of_name.setdefault(name, row["person"]) == row["person"], "the id of a name stays"
        assert by_name.items() >= {name: person_of_name[name] for name in by_name if name in person_of_name}.items()
        for row in decided:
            both = {row["face_id"], row.get("other_face_id", row["face_id"])}
            if both <= present and "other_face_id" in row:
                is_one = len({clusters[face] for face in both}) == 1
                assert is_one == (row["decision"] == "same_as")
    return person_of_name


def test_persons_of_lfw_survive_ten_clusterings(shared: Path, tmp_path: Path) -> None:
    """The same on 130 real photos, with decisions of a reviewer who knows their labels."""
    images = shared / "data" / "lfw-dev" / "images"
    persons = [(path, sorted(path.iterdir())) for path in sorted(images.iterdir()) if path.is_dir()]
    chosen = [(path, photos[:5]) for path, photos in persons if len(photos) >= 5][:18]
    chosen += [(path, photos) for path, photos in persons if len(photos) == 1][:40]
    for path, photos in chosen:
        (tmp_path / "images" / path.name).mkdir(parents=True)
        for photo in photos:
            (tmp_path / "images" / path.name / photo.name).symlink_to(photo)
    embed(tmp_path / "images", tmp_path / "g", runner="inline")
    made = Gallery(str(tmp_path / "g"))
    drawn = made.to_arrow()
    faces = drawn.filter(pc.fill_null(pc.equal(drawn["face_index"], 0), False)).select(["face_id", "identity"])
    by_person: dict[str, list[int]] = {}
    for row in faces.to_pylist():
        by_person.setdefault(row["identity"], []).append(row["face_id"])
    many = [held for held in by_person.values() if len(held) >= 4]
    once = [held[0] for held in by_person.values() if len(held) == 1]
    decided = [
        {"decision": "is", "face_id": face, "person": f"person {n}"} for n, held in enumerate(many) for face in held[:2]
    ]
    decided += [{"decision": "same_as", "face_id": held[2], "other_face_id": held[3]} for held in many]
    decided += [
        {"decision": "different_from", "face_id": first, "other_face_id": second}
        for first, second in itertools.pairwise(once)
    ]
    assert len(cluster_ten_times(made, drawn, decided, {})) == len(many)


def test_faces_of_a_named_person_answer_with_its_name(gallery: Gallery, drawn: pa.Table, ids: list[list[int]]) -> None:
    """One face is named; all faces of its cluster answer with the name, and so do those that come later."""
    at = drawn.schema.get_field_index("identity")
    unlabelled = drawn.set_column(at, drawn.schema.field(at), pa.nulls(drawn.num_rows, pa.string()))
    opened = replace_rows(gallery, conform(unlabelled))
    decide(opened, {"decision": "is", "face_id": ids[2][1], "person": "Ann"})
    cluster(opened)
    build_index(build(IndexConfig), opened.path)
    (ann,) = [row for row in read(opened, PERSONS).to_pylist() if row["name"]]
    found, vectors = opened.vectors()
    index = Index(opened.path)
    hits = index.search(vectors, 1)
    names = dict(zip(found.tolist(), index.get_labels(hits.ids[:, 0])["identity"].to_pylist(), strict=True))
    assert names == {face: "Ann" if face in ids[2] else None for face in found.tolist()}
    persons = index.get_persons(np.array(ids[2] + ids[3])).to_pylist()
    assert persons == [ann["person"]] * EACH + [None] * EACH
    # A new face of hers, and one that is not hers by decision.
    truth = np.array([2, 2])
    more = rows(truth, Faces(seed=3).draw(truth, 77), 7000)
    append(opened, [more.set_column(at, more.schema.field(at), pa.nulls(2, pa.string()))], "more")
    later, other = more["face_id"].to_pylist()
    decide(Gallery(opened.path), {"decision": "is_not", "face_id": other, "person": "Ann"})
    assign(opened.path)
    build_index(build(IndexConfig), opened.path)
    assert Index(opened.path).get_labels(np.array([later, other]))["identity"].to_pylist() == ["Ann", None]
    queries = Path(opened.path).parent / "queries.parquet"
    pq.write_table(pa.table({"id": ["q"], "embedding": [vectors[found.tolist().index(ids[2][0])].tolist()]}), queries)
    out = str(queries.with_name("out.parquet"))
    search(build(SearchConfig, {"search": {"k": 1}}), opened.path, str(queries), out)
    answers = pq.read_table(out)
    assert answers["person"].to_pylist() == [ann["person"]]
    assert answers["identity"].to_pylist() == ["Ann"]


def test_a_name_leaves_the_reports_with_its_faces(gallery: Gallery, drawn: pa.Table, ids: list[list[int]]) -> None:
    """A name that only decisions gave is in no report any more when the last face that bears it is erased."""
    decide(
        gallery,
        {"decision": "is", "face_id": ids[2][0], "person": "Zacharias Quux"},
        {"decision": "is", "face_id": ids[2][1], "person": "Zacharias Quux"},
        {"decision": "is", "face_id": ids[4][0], "person": "Somebody"},
    )
    cluster(gallery)
    reports = Path(gallery.path, "reports", "cluster")

    def list_files_with(name: str) -> set[str]:
        found = set()
        for path in reports.iterdir():
            held = str(pq.read_table(path).to_pylist()) if path.suffix == ".parquet" else path.read_text("latin-1")
            if name in held:
                found.add(path.name)
        return found

    uris = dict(zip(drawn["face_id"].to_pylist(), drawn["uri"].to_pylist(), strict=True))
    assert list_files_with("Zacharias") >= {PERSONS, FACES}
    erase.run(Selection(images=(uris[ids[2][0]],)), gallery.path)
    assert PERSONS in list_files_with("Zacharias"), "another face still bears it"
    erase.run(Selection(images=(uris[ids[2][1]],)), gallery.path)
    assert not list_files_with("Zacharias")
    assert PERSONS in list_files_with("Somebody")
    assert cluster(Gallery(gallery.path)).named == 1
