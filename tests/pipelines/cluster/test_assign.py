"""cluster --assign: known persons join their clusters, ids of old ones stay, and no number is ever given twice."""

import os
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from bench.galleries import Faces, append, rows
from deltalake import DeltaTable
from deltalake.transaction import AddAction, RemoveAction
from hard_faces import DlibLike, make_hard_gallery

from facepipe.config import build
from facepipe.curation.clusters.assign import assign_faces
from facepipe.curation.clusters.assignments import AssignmentTable
from facepipe.curation.clusters.sums import MARK, SUMS, clear_stale_sums
from facepipe.curation.graph.clusters import Clusters
from facepipe.errors import EvaluationError, GalleryBusyError, GalleryError, StorageError
from facepipe.gallery import Contract, Gallery
from facepipe.gallery.commits.parts import compute_statistics, encode_parquet
from facepipe.schema import conform
from facepipe.storage.lease import hold_lease
from pipelines.cluster import ClusterConfig, ClusterRules
from pipelines.cluster import assign as pipeline
from pipelines.cluster import run as cluster
from pipelines.cluster.assign import AssignSummary, run
from pipelines.index import IndexConfig
from pipelines.index import run as index

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
PERSONS, EACH = 60, 10


def add(gallery: Gallery, truth: np.ndarray, first: int, **columns: Any) -> Gallery:
    """Append faces of these persons, numbered from `first`; their identity says who they are."""
    made = rows(np.asarray(truth), Faces().draw(np.asarray(truth), first), first)
    for name, values in columns.items():
        at = made.schema.get_field_index(name)
        made = made.set_column(at, made.schema.field(at), pa.array(values, made.schema.field(at).type))
    append(gallery, [made], f"from{first}")
    return Gallery(gallery.path)


def remove(gallery: Gallery, uris: set[str]) -> None:
    """Rewrite the table without the rows of some images."""
    table, now = DeltaTable(gallery.faces_folder), int(time.time() * 1000)
    actions: list[Any] = [RemoveAction(file["path"], True, now) for file in Gallery(gallery.path).files()]
    rows_ = conform(Gallery(gallery.path).to_arrow())
    kept = rows_.filter(pc.invert(pc.is_in(rows_["uri"], pa.array(sorted(uris), pa.string()))))
    data = encode_parquet(kept)
    name = f"rewritten-{time.time_ns()}.parquet"
    Path(gallery.faces_folder, name).write_bytes(data)
    actions.append(AddAction(name, len(data), {}, now, True, compute_statistics(kept)))
    table.create_write_transaction(actions, "append", table.schema())


@pytest.fixture
def gallery(tmp_path: Path) -> Gallery:
    """60 persons of 10 faces, clustered."""
    made = add(Gallery.create(str(tmp_path / "g"), DLIB), np.repeat(np.arange(PERSONS), EACH), 0)
    assert cluster(build(ClusterConfig), made.path).clusters == PERSONS
    return made


def tables(gallery: Gallery) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """(rows of faces.parquet, those of clusters.parquet by number), checked against each other and the gallery."""
    folder = Path(gallery.path, "reports", "cluster")
    faces, clusters = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("faces", "clusters"))
    by_number = {row["cluster"]: row for row in clusters}
    assert len(by_number) == len(clusters)
    held = Gallery(gallery.path).to_arrow(["face_id", "uri", "identity"], "face_id is not null")
    named = [{k: row[k] for k in ("face_id", "uri", "identity")} for row in faces]
    assert sorted(named, key=lambda row: row["face_id"]) == held.sort_by("face_id").to_pylist()
    members = defaultdict(list)
    for row in faces:
        members[row["cluster"]].append(row)
    for number, row in by_number.items():
        inside = members.get(number, [])
        assert row["size"] == len(inside)
        assert all(face["size"] == len(inside) for face in inside)
        assert [face["face_id"] for face in inside if face["medoid"]] == [row["medoid"]][: len(inside)]
    assert set(members) <= set(by_number)
    return faces, by_number


def persons(faces: list[dict[str, Any]]) -> dict[str, set[int]]:
    """The clusters of each person."""
    found = defaultdict(set)
    for row in faces:
        found[row["identity"]].add(row["cluster"])
    return dict(found)


def files(gallery: Gallery) -> dict[str, Any]:
    """What the report's files hold: rows of tables, bytes of the rest."""
    folder = Path(gallery.path, "reports", "cluster")
    return {p.name: pq.read_table(p) if p.suffix == ".parquet" else p.read_bytes() for p in sorted(folder.iterdir())}


def counts(summary: AssignSummary) -> tuple[int, int, int, int]:
    return summary.new, summary.placed, summary.clusters, summary.gone


def test_known_persons_join_and_strangers_are_new(gallery: Gallery) -> None:
    before, old = tables(gallery)
    truth = np.concatenate([np.arange(0, PERSONS, 2), np.repeat([900, 901], 4), [902]])
    add(gallery, truth, 1000)
    assert counts(run(gallery.path)) == (39, 30, 3, 0)
    after, new = tables(gallery)
    numbers = {row["face_id"]: row["cluster"] for row in before}
    assert all(row["cluster"] == numbers.get(row["face_id"], row["cluster"]) for row in after), "old ids stay"
    fits = {row["face_id"]: row["fit"] for row in before}
    assert all(row["fit"] == fits.get(row["face_id"]) for row in after), "and their figures"
    of = persons(after)
    assert all(len(found) == 1 for found in of.values())
    assert sorted(n for who in ("person900", "person901", "person902") for n in of[who]) == [60, 61, 62]
    assert set(new) == set(old) | {60, 61, 62}
    assert {n: row["medoid"] for n, row in new.items() if n in old} == {n: row["medoid"] for n, row in old.items()}


def test_new_clusters_are_known_the_next_time(gallery: Gallery) -> None:
    add(gallery, np.repeat([900, 901], 5), 1000)
    run(gallery.path)
    first = persons(tables(gallery)[0])
    add(gallery, np.repeat([900, 901, 902], 3), 2000)
    assert counts(run(gallery.path)) == (9, 6, 1, 0)
    second = persons(tables(gallery)[0])
    assert {who: second[who] for who in first} == first
    assert second["person902"] == {62}


def test_nothing_new_changes_nothing(gallery: Gallery) -> None:
    before = files(gallery)
    assert counts(run(gallery.path)) == (0, 0, 0, 0)
    assert files(gallery) == before
    add(gallery, np.repeat([3, 900], 4), 1000)
    run(gallery.path)
    before = files(gallery)
    assert counts(run(gallery.path)) == (0, 0, 0, 0)
    assert files(gallery) == before


def test_numbers_are_not_used_again(gallery: Gallery) -> None:
    """The newest cluster loses all its faces, and then another stranger comes."""
    add(gallery, np.repeat([900], 4), 1000)
    assert counts(run(gallery.path)) == (4, 0, 1, 0)
    faces, _ = tables(gallery)
    remove(gallery, {row["uri"] for row in faces if row["identity"] == "person900"})
    assert counts(run(gallery.path)) == (0, 0, 0, 4)
    assert tables(gallery)[1][60]["size"] == 0
    add(gallery, np.repeat([901], 4), 2000)
    assert counts(run(gallery.path)) == (4, 0, 1, 0)
    faces, clusters = tables(gallery)
    assert persons(faces)["person901"] == {61}
    assert (clusters[60]["size"], clusters[61]["size"]) == (0, 4)
    add(gallery, np.repeat([902], 4), 3000)
    run(gallery.path)
    assert persons(tables(gallery)[0])["person902"] == {62}


def test_removed_faces_leave(gallery: Gallery) -> None:
    """Also those that stood for their cluster; what is left of it still takes in new faces."""
    faces, clusters = tables(gallery)
    medoids = {row["uri"] for row in faces if row["medoid"]}
    gone = medoids | {row["uri"] for row in faces if row["identity"] == "person7"}
    remove(gallery, gone)
    assert counts(run(gallery.path)) == (0, 0, 0, len(gone))
    after, left = tables(gallery)
    assert {row["uri"] for row in after} == {row["uri"] for row in faces} - gone
    assert set(left) == set(clusters)
    add(gallery, np.arange(PERSONS), 1000)
    summary = run(gallery.path)
    assert counts(summary) == (PERSONS, PERSONS - 1, 1, 0), "nobody joins a cluster without faces"
    assert persons(tables(gallery)[0])["person7"] == {60}


def test_two_faces_of_a_photo_are_two_persons(gallery: Gallery) -> None:
    """Twins in the eyes of the model: neither among the new ones, nor with faces that were there."""
    before, _ = tables(gallery)
    number = next(row["cluster"] for row in before if row["identity"] == "person5")
    there = next(row["uri"] for row in before if row["identity"] == "person5")
    add(
        gallery,
        np.array([5, 5, 900, 900, 5]),
        1000,
        uri=["/new/a", "/new/a", "/new/b", "/new/b", there],
        face_index=[0, 1, 0, 1, 1],
    )
    assert run(gallery.path).placed == 1
    after, _ = tables(gallery)
    by_photo = defaultdict(list)
    for row in after:
        by_photo[row["uri"]].append(row["cluster"])
    assert all(len(set(found)) == len(found) for found in by_photo.values())
    assert number in by_photo["/new/a"]
    assert number in by_photo[there]


def test_faces_of_one_photo_may_be_one_person_if_said_so(gallery: Gallery) -> None:
    there = next(row["uri"] for row in tables(gallery)[0] if row["identity"] == "person5")
    add(gallery, np.array([5, 5, 5]), 1000, uri=["/new/a", "/new/a", there], face_index=[0, 1, 1])
    assert counts(run(gallery.path, one_photo=False)) == (3, 3, 0, 0)


def test_new_faces_alone_in_a_gallery_whose_clusters_are_empty(gallery: Gallery) -> None:
    remove(gallery, {row["uri"] for row in tables(gallery)[0]})
    assert counts(run(gallery.path)) == (0, 0, 0, PERSONS * EACH)
    assert counts(run(gallery.path)) == (0, 0, 0, 0)
    add(gallery, np.repeat([1, 2], 4), 1000)
    assert counts(run(gallery.path)) == (8, 0, 2, 0)
    assert persons(tables(gallery)[0]) in ({"person1": {60}, "person2": {61}}, {"person1": {61}, "person2": {60}})


def test_without_clusters_it_says_how_to_make_them(tmp_path: Path) -> None:
    made = add(Gallery.create(str(tmp_path / "g"), DLIB), np.zeros(3, int), 0)
    with pytest.raises(EvaluationError, match=r"run `facepipe cluster .*` first"):
        run(made.path)
    assert not (tmp_path / "g" / "reports").exists()
    with pytest.raises(GalleryError, match="no gallery at"):
        run(str(tmp_path / "none"))


def test_what_is_damaged_is_named(gallery: Gallery) -> None:
    state = Path(gallery.path, "reports", "cluster", "state.npz")
    state.write_bytes(b"x")
    with pytest.raises(StorageError, match="cannot add to the clusters"):
        run(gallery.path)
    Path(gallery.path, "reports", "cluster", "clusters.parquet").write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="cannot read"):
        run(gallery.path)


def test_an_interrupted_run_leaves_the_old_tables(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(gallery)
    add(gallery, np.arange(5), 1000)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(gallery.path)
    assert files(gallery) == before
    folder = Path(gallery.path, "reports", "cluster")
    folder.rename(folder.with_suffix(".old"))  # as when a run is killed while it puts the new tables in place
    assert counts(run(gallery.path)) == (5, 5, 0, 0)
    assert set(files(gallery)) == set(before)
    assert set(os.listdir(Path(gallery.path, "reports"))) <= {"cluster", "graph", ".lock", ".lock.guard"}
    with hold_lease(os.path.join(gallery.path, "reports"), "reports"), pytest.raises(GalleryBusyError):
        run(gallery.path)


def full(gallery: Gallery, to: Path) -> Gallery:
    """A copy of the gallery whose report has no sums: the next run reads every vector."""
    shutil.copytree(gallery.path, to)
    Path(to, "reports", "cluster", SUMS).unlink()
    return Gallery(str(to))


def state(gallery: Gallery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.load(Path(gallery.path, "reports", "cluster", SUMS)) as held:
        return held["sums"], held["crowd"], held["size"]


def report(gallery: Gallery) -> dict[str, pa.Table]:
    """The tables, rows in one order."""
    folder = Path(gallery.path, "reports", "cluster")
    return {
        n: pq.read_table(folder / f"{n}.parquet").sort_by(k) for n, k in (("faces", "face_id"), ("clusters", "cluster"))
    }


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_nights_that_read_what_is_new_are_as_good_as_reading_all(
    gallery: Gallery, tmp_path: Path, seed: int, indexed: bool
) -> None:
    """Nights of new faces, faces that go, tables that are rewritten, and files that are deleted for good."""
    rng = np.random.default_rng(seed)
    for night in range(5):
        add(gallery, rng.choice(np.r_[0:PERSONS, 900:910], 25), 1000 * (night + 1))
        if indexed:
            index(IndexConfig(), gallery.path)
        if night % 2:
            uris = sorted(row["uri"] for row in Gallery(gallery.path).to_arrow(["uri"]).to_pylist())
            remove(gallery, {str(uri) for uri in rng.choice(uris, 12, replace=False)})
        if night == 3:
            vacuum(gallery)
        whole = full(gallery, tmp_path / f"night{night}")
        new, all_ = run(gallery.path), run(whole.path)
        assert (new.full, all_.full) == (False, True)
        assert counts(new) == counts(all_)
        assert new.new > 0
        assert (new.gone > 0) == bool(night % 2)
        assert report(gallery) == report(whole)
        for mine, theirs in zip(state(gallery), state(whole), strict=True):
            np.testing.assert_allclose(mine, theirs, atol=2e-5)
        tables(gallery)


def vacuum(gallery: Gallery) -> None:
    """Delete the files that are in the table no more."""
    held = {file["path"] for file in Gallery(gallery.path).files()}
    for path in Path(gallery.faces_folder).glob("*.parquet"):
        if path.name not in held:
            path.unlink()


def test_what_is_old_is_not_read(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    add(gallery, np.arange(5), 1000)

    def read(self: Gallery, columns: Any = None, *_: Any, **__: Any) -> Any:
        raise AssertionError(f"all rows were asked for {columns}")

    with monkeypatch.context() as patched:
        patched.setattr(Gallery, "_split_files", read)
        with pytest.raises(AssertionError, match="all rows"):
            run(gallery.path)  # the new files are read by way of the table's list of files
    old = {file["path"] for file in Gallery(gallery.path, 1).files()}
    assert old
    for path in old:
        Path(gallery.faces_folder, path).rename(Path(gallery.path, path))
    assert counts(run(gallery.path)) == (5, 5, 0, 0)


def test_a_report_without_sums_gets_them(gallery: Gallery) -> None:
    folder = Path(gallery.path, "reports", "cluster")
    sums = state(gallery)
    for damage in (lambda: (folder / SUMS).unlink(), lambda: (folder / SUMS).write_bytes(b"x"), (folder / MARK).unlink):
        damage()
        summary = run(gallery.path)
        assert (summary.full, counts(summary)) == (True, (0, 0, 0, 0))
        for mine, before in zip(state(gallery), sums, strict=True):
            np.testing.assert_allclose(mine, before, atol=2e-5)
        assert not run(gallery.path).full


@pytest.mark.parametrize("told", [False, True])
def test_clusters_of_the_erased_are_summed_anew(gallery: Gallery, tmp_path: Path, told: bool) -> None:
    """Rows left the report's tables, also those of clusters with an erased medoid, and a single face's row the sums."""
    add(gallery, np.array([900, 901]), 1000)
    run(gallery.path)
    faces, clusters = tables(gallery)
    gone = [row for row in faces if row["medoid"]][:3] + [row for row in faces if row["identity"] == "person900"]
    numbers, ids = sorted({row["cluster"] for row in gone}), pa.array([row["face_id"] for row in gone])
    assert clusters[numbers[-1]]["size"] == 1
    remove(gallery, {row["uri"] for row in gone})
    folder = Path(gallery.path, "reports", "cluster")
    for name, column in (("faces", "face_id"), ("clusters", "medoid")):
        table = pq.read_table(folder / f"{name}.parquet")
        pq.write_table(table.filter(pc.invert(pc.is_in(table[column], ids))), folder / f"{name}.parquet")
    sums, crowd, size = state(gallery)
    np.savez(folder / SUMS, sums=np.delete(sums, numbers[-1], axis=0), crowd=crowd, size=size)
    if told:
        clear_stale_sums(str(folder), AssignmentTable(str(folder / "faces.parquet")).count_faces())
        assert not state(gallery)[0][numbers].any()
    whole = full(gallery, tmp_path / "full")
    assert (run(gallery.path).full, run(whole.path).full) == (False, True)
    mine, theirs = report(gallery), report(whole)
    assert mine["faces"] == theirs["faces"]
    assert mine["clusters"].drop_columns("cohesion") == theirs["clusters"].drop_columns("cohesion")
    for one, other in zip(state(gallery), state(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    after, _ = tables(gallery)
    assert len(after) == len(faces) - len(gone)
    assert set(np.flatnonzero(state(gallery)[2] == 0)) == {numbers[-1]}
    assert not run(gallery.path).full


def test_what_cannot_be_forgotten_in_part_is_deleted(gallery: Gallery) -> None:
    folder = Path(gallery.path, "reports", "cluster")
    (folder / SUMS).write_bytes(b"x")
    clear_stale_sums(str(folder), AssignmentTable(str(folder / "faces.parquet")).count_faces())
    assert not (folder / SUMS).exists()
    assert run(gallery.path).full


def test_a_compaction_moves_the_mark_and_nothing_else(gallery: Gallery) -> None:
    before = files(gallery)
    remove(gallery, set())  # rewrites the table as it is
    assert counts(run(gallery.path)) == (0, 0, 0, 0)
    after = files(gallery)
    assert after.pop(MARK) != before.pop(MARK)
    assert after == before


@pytest.mark.parametrize("known", [0, 1, 5])
def test_assign_is_by_the_mean_over_a_clusters_faces(known: int) -> None:
    """Against a double loop."""
    truth = np.repeat(np.arange(known), 4)
    old, new = Faces().draw(truth, 0), Faces().draw(np.arange(8), 1)
    singles = Clusters.from_faces(old, np.zeros(len(old), np.float32))
    clusters = singles.merge(truth) if known else singles
    placed = assign_faces(Clusters.from_faces(new, np.zeros(8, np.float32)), clusters, 0.91, np.empty((0, 2), np.int64))
    mean = np.array([[(new[n] @ old[truth == k].T).mean() for k in range(known)] for n in range(8)]).reshape(8, known)
    best = mean.argmax(axis=1) if known else np.zeros(8, int)
    near = mean.max(axis=1, initial=-1) >= 0.91
    assert placed.known.tolist() == np.where(near, best, -1).tolist()
    assert ((placed.new >= 0) == ~near).all()
    assert (placed.known[:known] == np.arange(known)).all(), "there is something to find"


# ------------------------------------------------------------------ a gallery that grows


def grow(path: Path, seed: int) -> tuple[Gallery, np.ndarray, DlibLike, np.ndarray]:
    """A gallery of 1,200 hard faces of some of 700 persons, and what the next ones are drawn from."""
    space = DlibLike(seed)
    centres = space.draw_centres(700)
    person = np.random.default_rng(seed).permutation(np.repeat(np.arange(700), 4))
    made = make_hard_gallery(path, space.draw(centres, person[:1200]), DLIB, seed)
    cluster(build(ClusterConfig), made.path)
    return made, person, space, centres


def bring(gallery: Gallery, space: DlibLike, centres: np.ndarray, person: np.ndarray, first: int) -> None:
    """Add faces, numbered from `first`."""
    faces = space.draw(centres, person)
    made = rows(faces.label, faces.vectors, first)
    append(gallery, [made], f"from{first}")


def read_clusters(gallery: Gallery) -> dict[int, tuple[int, str]]:
    table = pq.read_table(Path(gallery.path, "reports", "cluster", "faces.parquet"))
    cells = zip(*(table[name].to_pylist() for name in ("face_id", "cluster", "identity")), strict=True)
    return {face_id: (number, identity) for face_id, number, identity in cells}


def test_newcomers_rarely_join_strangers(tmp_path: Path) -> None:
    """In a small night, and in one that doubles the gallery: then all is clustered anew, and numbers stay."""
    gallery, person, space, centres = grow(tmp_path / "g", 5)
    done = 1200
    for count, anew in ((150, False), (1400, True)):
        before = read_clusters(gallery)
        known = {f"person{n}" for n in person[:done]}
        bring(gallery, space, centres, person[done : done + count], done)
        done += count
        summary = run(gallery.path)
        assert (summary.anew, summary.new, summary.gone) == (anew, count, 0)
        assert summary.growth == pytest.approx(1 if anew else done / 1200, abs=0.01)
        after, by_number = tables(gallery)
        found = read_clusters(gallery)
        earlier = {found[face_id][0] for face_id in before}
        newcomers = [row for row in after if row["face_id"] not in before and row["identity"] not in known]
        joined = sum(row["cluster"] in earlier for row in newcomers)
        assert joined <= 2 + 0.03 * len(newcomers)
        # Most faces keep the number of their cluster, and no number of another cluster is given to a new one.
        stayed = np.mean([found[face_id][0] == number for face_id, (number, _) in before.items()])
        assert stayed > 0.8
        assert max(by_number) < len(before) + done
    assert counts(run(gallery.path)) == (0, 0, 0, 0)


def test_a_large_gallery_is_told_when_to_cluster_anew(tmp_path: Path) -> None:
    gallery, person, space, centres = grow(tmp_path / "g", 6)
    bring(gallery, space, centres, person[1200:1600], 1200)
    said: list[str] = []
    summary = run(gallery.path, progress=said.append, rules=ClusterRules(anew_faces=1000))
    assert not summary.anew
    assert summary.growth == pytest.approx(1600 / 1200, abs=0.01)
    assert f"run `facepipe cluster {gallery.path} --keep-ids`" in summary.advice
    assert summary.advice in said
    before = read_clusters(gallery)
    made = cluster(build(ClusterConfig), gallery.path, keep_ids=True)
    after = read_clusters(gallery)
    assert made.faces == len(after) == 1600
    assert np.mean([after[face_id][0] == number for face_id, (number, _) in before.items()]) > 0.8
    assert not run(gallery.path).advice


def test_settings_of_the_clustering_hold_when_it_is_made_anew(tmp_path: Path) -> None:
    made = add(Gallery.create(str(tmp_path / "g"), DLIB), np.repeat(np.arange(30), 4), 0)
    first = cluster(build(ClusterConfig, {"graph": {"threshold": 0.2}}), made.path)
    add(made, np.repeat(np.arange(30), 2), 1000)
    summary = run(made.path)
    assert summary.anew
    assert summary.distance == pytest.approx(first.distance, abs=1e-3)


def test_a_report_of_an_older_version_is_added_to_as_before(gallery: Gallery) -> None:
    """It does not say what it was made from: nothing is clustered anew, and the command is named."""
    state = Path(gallery.path, "reports", "cluster", "state.npz")
    with np.load(state) as held:
        cohort = held["cohort"]
        threshold = held["threshold"]
    np.savez(state, cohort=cohort, threshold=threshold)
    add(gallery, np.repeat(np.arange(PERSONS), 4), 1000)
    summary = run(gallery.path)
    assert (summary.anew, summary.growth, summary.placed) == (False, 0, 4 * PERSONS)
    assert "--keep-ids" in summary.advice


def test_two_cut_faces_found_no_person(tmp_path: Path) -> None:
    """Neither together in one night, nor one night after the other; a third one that is whole joins them."""
    made = Gallery.create(str(tmp_path / "g"), DLIB)
    add(made, np.repeat(np.arange(PERSONS), EACH), 0, visible=np.ones(PERSONS * EACH, np.float32))
    cluster(build(ClusterConfig), made.path)
    add(made, np.repeat([900, 901], 2), 1000, visible=[0.5, 0.5, 1.0, 1.0])
    run(made.path)
    assert {who: len(persons(tables(made)[0])[who]) for who in ("person900", "person901")} == {
        "person900": 2,
        "person901": 1,
    }
    add(made, np.array([900]), 2000, visible=[0.5])
    run(made.path)
    assert len(persons(tables(made)[0])["person900"]) == 3
    add(made, np.array([0, 900]), 3000, visible=[0.5, 1.0])
    run(made.path)
    of = persons(tables(made)[0])
    assert len(of["person0"]) == 1, "a cut face joins a person"
    assert len(of["person900"]) == 3, "and a whole one joins a cut one"
