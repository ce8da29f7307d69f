"""What people have decided on labels: confirmed ones are certain, rejected ones do not come back, names count everywhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from bench.galleries import Faces, append, rows

from facepipe.config import build
from facepipe.decisions import add_decisions
from facepipe.decisions.gallery import DecidedGallery
from facepipe.gallery import Contract, Gallery
from facepipe.index.search import Index
from pipelines import clean, finish
from pipelines.index import IndexConfig
from pipelines.index import run as build_index

DLIB = Contract.from_models("retinaface-mnet025", "dlib-resnet", True)
PERSONS = 20
EACH = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gallery, np.ndarray, np.ndarray]:
    """A gallery of 20 persons with 8 faces each, of which one has the next person's label; ids and true persons."""
    truth = np.repeat(np.arange(PERSONS), EACH)
    labels = truth.copy()
    labels[::EACH] = (truth[::EACH] + 1) % PERSONS
    table = rows(truth, Faces(seed=5).draw(truth, 1), 0)
    names = [f"person{label}" for label in labels.tolist()]
    table = table.set_column(table.schema.get_field_index("identity"), "identity", [names])
    gallery = Gallery.create(str(tmp_path_factory.mktemp("decided") / "g"), DLIB)
    append(gallery, [table], "test")
    return Gallery(gallery.path), np.array(table["face_id"].to_pylist()), truth


def run_clean(gallery: Gallery) -> dict[int, dict[str, Any]]:
    """Run `clean`, and return its decisions by face."""
    clean.run(build(clean.CleanConfig, {"run": {"runner": "inline"}}), gallery.path)
    found = pq.read_table(Path(gallery.path, "reports", "clean", "decisions.parquet")).to_pylist()
    return {row["face_id"]: row for row in found}


def test_decisions_on_labels_hold_in_every_run(made: tuple[Gallery, np.ndarray, np.ndarray]) -> None:
    gallery, ids, _ = made
    before = run_clean(gallery)
    wrong = ids.reshape(PERSONS, EACH)[:, 0].tolist()
    assert sum(before[face]["decision"] == "relabel" for face in wrong) >= PERSONS - 2
    right = ids.reshape(PERSONS, EACH)[:, 1:].ravel().tolist()
    doubted = {
        "named": wrong[0],  # the right name
        "kept": wrong[1],  # the wrong label, which people insist on
        "stubborn": wrong[2],  # the wrong label as a name
        "rejected": wrong[3],  # not the person that is suggested
        "nobody": wrong[4],
        "unlabelled": wrong[5],  # not the person of its label
    }
    decisions = [
        {"decision": "is", "face_id": doubted["named"], "person": "person0"},
        {"decision": "keep", "face_id": doubted["kept"]},
        {"decision": "is", "face_id": doubted["stubborn"], "person": before[doubted["stubborn"]]["identity"]},
        {"decision": "is_not", "face_id": doubted["rejected"], "person": before[doubted["rejected"]]["suggested"]},
        {"decision": "ignore", "face_id": doubted["nobody"]},
        {"decision": "is_not", "face_id": doubted["unlabelled"], "person": before[doubted["unlabelled"]]["identity"]},
        {"decision": "is", "face_id": right[0], "person": "Somebody else"},
    ]
    rows_ = [{name: str(value) for name, value in row.items()} for row in decisions]
    assert add_decisions(gallery, rows_, who="tester").is_applied
    after = run_clean(gallery)
    for name in ("named", "kept", "stubborn"):
        row = after[doubted[name]]
        assert (row["decision"], row["reason"], row["noise"]) == ("keep", "people have confirmed it", 0)
    assert after[doubted["named"]]["identity"] == "person0"
    assert after[doubted["rejected"]]["suggested"] != before[doubted["rejected"]]["suggested"]
    assert doubted["nobody"] not in after
    assert doubted["unlabelled"] not in after
    assert after[right[0]]["identity"] == "Somebody else"
    assert after[right[0]]["decision"] == "keep"
    # The others are judged as before.
    others = sorted(set(before) - {*doubted.values(), right[0]})
    assert np.mean([after[face]["decision"] == before[face]["decision"] for face in others]) > 0.97
    # A person that people have confirmed is certain evidence for the rest.
    rows_by_name = DecidedGallery(gallery.path).to_arrow(["face_id", "identity"]).to_pylist()
    identities = {row["face_id"]: row["identity"] for row in rows_by_name}
    assert {face: row["identity"] for face, row in after.items()} == {
        face: name for face, name in identities.items() if name is not None
    }
    visible = DecidedGallery(gallery.path, drop_ignored=True).to_arrow(["uri"])
    assert visible.num_rows == len(ids) - 1


def test_answers_have_names_and_leave_out_whom_people_ignore(made: tuple[Gallery, np.ndarray, np.ndarray]) -> None:
    gallery, ids, _ = made
    build_index(build(IndexConfig, {}), gallery.path)
    decided = DecidedGallery(gallery.path).decided
    assert len(decided.ignored) == 1
    index = Index(gallery.path)
    found_ids, vectors = gallery.vectors()
    hits = index.search(vectors, 3)
    assert not np.isin(decided.ignored, hits.ids).any()
    own = hits.ids[~np.isin(found_ids, decided.ignored), 0]
    assert np.array_equal(own, found_ids[~np.isin(found_ids, decided.ignored)])
    labels = index.get_labels(ids)
    identities = dict(zip(ids.tolist(), labels["identity"].to_pylist(), strict=True))
    rows_ = DecidedGallery(gallery.path).to_arrow(["face_id", "identity"]).to_pylist()
    assert identities == {row["face_id"]: row["identity"] for row in rows_}
    everything = Index(gallery.path, with_ignored=True)
    assert everything.live == index.live + 1
    assert np.isin(decided.ignored, everything.search(vectors, 3).ids).all()


def test_lists_are_made_anew_after_a_decision(made: tuple[Gallery, np.ndarray, np.ndarray], tmp_path: Path) -> None:
    gallery, ids, _ = made
    config = build(finish.FinishConfig, {"run": {"runner": "inline"}})
    finish.run(config, gallery.path, str(tmp_path / "out"))
    report = Path(gallery.path, "reports", "clean", "decisions.parquet")
    first = report.read_bytes()
    finish.run(config, gallery.path, str(tmp_path / "out"))
    assert report.read_bytes() == first
    decision = {"decision": "is", "face_id": str(ids[20]), "person": "A new name"}
    assert add_decisions(gallery, [decision], who="tester").is_applied
    finish.run(config, gallery.path, str(tmp_path / "out"))
    assert report.read_bytes() != first
    assert "A new name" in (tmp_path / "out" / "train.csv").read_text()
