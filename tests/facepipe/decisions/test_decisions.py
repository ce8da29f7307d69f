"""Decisions: once however often they are applied, in any order, undone and brought back, found again, never contradictory."""

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from decided import FAKES, Row, is_person, list_faces, list_ids, make_gallery, pair
from helpers import embed
from hypothesis import given
from hypothesis import strategies as st

from facepipe.decisions import add_decisions, find_conflicts, read_decisions, undo_decisions
from facepipe.decisions.rows import RowError, parse_row
from facepipe.decisions.schema import SCHEMA, compute_decision_id
from facepipe.decisions.table import DecisionTable, hold_decisions, verify_table
from facepipe.decisions.undo import find_active
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a gallery of 20 drawings with 0 to 2 faces each."""
    return make_gallery(tmp_path_factory.mktemp("decisions"))


@pytest.fixture
def gallery(embedded: Path) -> Iterator[Gallery]:
    """Return the gallery without decisions."""
    yield Gallery(str(embedded))
    shutil.rmtree(embedded / "decisions", ignore_errors=True)


def read_contents(gallery: Gallery) -> list[Row]:
    """All rows without the times at which they came in, in one order."""
    rows = DecisionTable(gallery.path).read().drop_columns(["added_at"]).to_pylist()
    return sorted(rows, key=lambda row: str(row["decision_id"]))


# ---- adding


def test_every_kind_comes_back_as_it_was_decided(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    rows = [
        is_person(ids[0], "Ann", when="2026-01-02T03:04:05Z", why="I know her", who="me"),
        {"decision": "is_not", "face_id": ids[1], "person": "Ann"},
        pair("same_as", ids[2], ids[3]),
        pair("different_from", ids[4], ids[2]),
        {"decision": "not_a_face", "face_id": ids[5]},
        {"decision": "ignore", "face_id": ids[6]},
        {"decision": "keep", "face_id": ids[7]},
    ]
    summary = add_decisions(gallery, rows, who="somebody", source="test")
    assert summary.is_applied
    assert sum(summary.added.values()) == 7
    decisions = read_decisions(gallery)
    assert decisions.confirmed.face_id.tolist() == [ids[0]]
    assert decisions.confirmed.person.to_pylist() == ["Ann"]
    assert decisions.rejected.face_id.tolist() == [ids[1]]
    assert sorted(decisions.same_pairs[0]) == sorted(ids[2:4])
    assert sorted(decisions.different_pairs[0]) == sorted([ids[2], ids[4]])
    assert decisions.not_faces.tolist() == [ids[5]]
    assert decisions.ignored.tolist() == [ids[6]]
    assert decisions.kept.tolist() == [ids[7]]
    row = next(row for row in decisions.rows.to_pylist() if row["decision"] == "is")
    assert (row["who"], row["why"], row["source"]) == ("me", "I know her", "test")
    assert row["decided_at"].isoformat() == "2026-01-02T03:04:05+00:00"
    assert verify_table(gallery.path) == (7, [])


def test_a_gallery_without_decisions_has_none_and_gets_no_folder(gallery: Gallery) -> None:
    decisions = read_decisions(gallery)
    assert len(decisions) == 0
    assert decisions.version == -1
    assert decisions.same_pairs.shape == (0, 2)
    assert add_decisions(gallery, [is_person(list_ids(gallery)[0], "Ann")], dry_run=True).added == {"is": 1}
    assert not (Path(gallery.path) / "decisions").exists()


def test_applied_twice_is_applied_once(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    rows = [is_person(ids[0], "Ann"), pair("same_as", ids[0], ids[1]), pair("same_as", ids[1], ids[0])]
    add_decisions(gallery, rows)
    before = read_contents(gallery)
    again = add_decisions(gallery, rows, who="another")
    assert (again.added, again.known) == ({}, 2)
    assert read_contents(gallery) == before
    assert len(before) == 2


def test_the_order_of_files_does_not_matter(gallery: Gallery) -> None:
    rng = random.Random(0)
    ids = list_ids(gallery)
    files = [
        [is_person(ids[0], "Ann"), is_person(ids[1], "Bob")],
        [pair("same_as", ids[2], ids[0]), pair("different_from", ids[1], ids[0])],
        [{"decision": "ignore", "face_id": ids[4]}, is_person(ids[0], "Ann")],
    ]
    outcomes = []
    for _ in range(3):
        shutil.rmtree(Path(gallery.path) / "decisions", ignore_errors=True)
        rng.shuffle(files)
        for rows in files:
            rng.shuffle(rows)
            assert add_decisions(gallery, rows).is_applied
        decisions = read_decisions(gallery)
        outcomes.append((read_contents(gallery), decisions.face_id.tolist(), decisions.other_face_id.tolist()))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_nothing_is_added_if_a_row_is_bad_unless_it_is_skipped(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    rows = [is_person(ids[0], "Ann"), is_person(4, "Bob"), {"decision": "is not", "face_id": ids[0]}]
    summary = add_decisions(gallery, rows)
    assert not summary.is_applied
    assert [problem.place for problem in summary.problems] == ["row 3", "row 2"]
    assert "did you mean is_not" in str(summary.problems[0])
    assert not DecisionTable(gallery.path).exists
    summary = add_decisions(gallery, rows, skip_bad=True)
    assert summary.is_applied
    assert summary.refused == 2
    assert len(read_decisions(gallery)) == 1


# ---- undo


def test_undo_and_undo_of_undo(gallery: Gallery) -> None:
    face = list_ids(gallery)[0]
    decision = add_decisions(gallery, [is_person(face, "Ann")]).added_ids[0]
    for turn in range(4):
        undo = undo_decisions(gallery, [decision[:12]], who="me").added_ids[0]
        assert len(read_decisions(gallery)) == turn % 2
        decision = undo
    # Applied again, what was taken back stays taken back.
    decision = DecisionTable(gallery.path).read().filter(pa.compute.field("decision") == "is")["decision_id"][0].as_py()
    undo_decisions(gallery, [decision])
    summary = add_decisions(gallery, [is_person(face, "Ann")])
    assert (summary.known, summary.undone) == (1, 1)
    assert len(read_decisions(gallery)) == 0


def test_an_undo_of_nothing_is_refused(gallery: Gallery) -> None:
    summary = add_decisions(gallery, [{"decision": "undo", "undoes": "0" * 32}])
    assert "no decision" in str(summary.problems[0])
    add_decisions(gallery, [is_person(list_ids(gallery)[0], "Ann")])
    with pytest.raises(ConfigError, match="no decision has the id"):
        undo_decisions(gallery, ["ffffffffffff"])
    with pytest.raises(ConfigError, match="too short"):
        undo_decisions(gallery, [""])


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=8), st.randoms(use_true_random=False))
def test_undos_do_not_depend_on_the_order_of_rows(choices: list[tuple[int, bool]], random: random.Random) -> None:
    rows = [{"decision_id": f"{n:032x}", "decision": "keep"} for n in range(3)]
    for target, _ in choices:
        undone = rows[target % len(rows)]["decision_id"]
        rows.append({"decision_id": f"{len(rows):032x}", "decision": "undo", "undoes": undone})
    expected = {row["decision_id"]: is_still_active(row["decision_id"], rows) for row in rows}
    random.shuffle(rows)
    table = pa.Table.from_pylist(rows, SCHEMA)
    assert dict(zip(table["decision_id"].to_pylist(), find_active(table).tolist(), strict=True)) == expected


def is_still_active(decision: str, rows: list[Row]) -> bool:
    undos = [row["decision_id"] for row in rows if row.get("undoes") == decision]
    return not any(is_still_active(undo, rows) for undo in undos)


# ---- conflicts


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("is"), st.integers(0, 5), st.sampled_from("AB")),
            st.tuples(st.just("is_not"), st.integers(0, 5), st.sampled_from("AB")),
            st.tuples(st.sampled_from(["same_as", "different_from"]), st.integers(0, 2), st.integers(3, 5)),
        ),
        max_size=7,
    )
)
def test_conflicts_are_what_no_assignment_of_persons_satisfies(rows: list[tuple[str, int, Any]]) -> None:
    table = pa.Table.from_pylist(
        [
            {
                "decision": kind,
                "face_id": face,
                "person": value if isinstance(value, str) else None,
                "other_face_id": value if isinstance(value, int) else None,
            }
            for kind, face, value in rows
        ],
        SCHEMA,
    )
    conflicts = find_conflicts(table)
    assert bool(conflicts) != is_satisfiable(rows)
    # What a conflict names is contradictory by itself.
    for conflict in conflicts:
        assert not is_satisfiable([rows[row] for row in conflict.rows])


def is_satisfiable(rows: list[tuple[str, int, Any]]) -> bool:
    """Try all assignments of six faces to A, B and four persons without a name."""

    def holds(persons: tuple[str, ...], kind: str, face: int, value: Any) -> bool:
        other = value if isinstance(value, str) else persons[value]
        return (persons[face] == other) == (kind in ("is", "same_as"))

    faces = sorted({face for _, face, _ in rows} | {value for *_, value in rows if isinstance(value, int)})
    for choice in itertools.product("ABwxyz", repeat=len(faces)):
        persons = dict(zip(faces, choice, strict=True))
        if all(holds(persons, *row) for row in rows):  # type: ignore[arg-type]
            return True
    return False


def test_a_conflict_names_both_rows_and_can_be_replaced(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    add_decisions(gallery, [is_person(ids[0], "Ann"), pair("same_as", ids[0], ids[1])], who="eve")
    summary = add_decisions(gallery, [is_person(ids[0], "Bob"), is_person(ids[2], "Cid")])
    assert not summary.is_applied
    assert str(summary.problems[0]).startswith(f"row 1: conflict: face {ids[0]} is 'Ann' and 'Bob'")
    assert "of eve" in str(summary.problems[0])
    # Skipped, only the other row gets in.
    assert add_decisions(gallery, [is_person(ids[0], "Bob"), is_person(ids[2], "Cid")], skip_bad=True).added == {
        "is": 1
    }
    # Replaced, the older one is taken back; once more changes nothing.
    summary = add_decisions(gallery, [is_person(ids[0], "Bob")], replace=True)
    assert summary.replaced == 1
    assert sorted(read_decisions(gallery).confirmed.person.to_pylist()) == ["Bob", "Cid"]
    assert add_decisions(gallery, [is_person(ids[0], "Bob")], replace=True).added == {}
    # A chain of several older ones does not say which of them is wrong.
    summary = add_decisions(gallery, [{"decision": "is_not", "face_id": ids[1], "person": "Bob"}], replace=True)
    assert not summary.is_applied
    assert not find_conflicts(read_decisions(gallery).rows)


def test_copies_of_a_photo_are_one_face_in_conflicts(gallery: Gallery) -> None:
    face = list_faces(gallery)[0]
    row = {"image_id": face["image_id"], "box": face["box"], "decision": "is"}
    rows = pa.Table.from_pylist([{**row, "face_id": 1, "person": "A"}, {**row, "face_id": 2, "person": "B"}], SCHEMA)
    assert len(find_conflicts(rows)) == 1


# ---- faces


def test_a_face_is_found_by_image_and_box(gallery: Gallery) -> None:
    face = list_faces(gallery)[0]
    moved = [number + 2 for number in face["box"]]
    row = {"decision": "ignore", "face_id": "5", "image_id": face["image_id"], "box": moved}
    assert add_decisions(gallery, [row]).is_applied
    assert read_decisions(gallery).ignored.tolist() == [face["face_id"]]
    far = {**row, "box": [number + 500 for number in face["box"]], "face_id": None}
    assert "no face of the gallery lies at this box" in str(add_decisions(gallery, [far]).problems[0])


def test_an_image_with_one_face_needs_no_face(gallery: Gallery) -> None:
    faces = list_faces(gallery)
    by_uri: dict[str, list[Row]] = {}
    for face in faces:
        by_uri.setdefault(face["uri"], []).append(face)
    single = next(group for group in by_uri.values() if len(group) == 1)[0]
    several = next(group for group in by_uri.values() if len(group) == 2)
    rows = [{"decision": "keep", "path": single["uri"]}, {"decision": "ignore", "uri": several[0]["uri"]}]
    summary = add_decisions(gallery, rows, skip_bad=True)
    assert "has 2 faces: give the `face_id`" in str(summary.problems[0])
    assert read_decisions(gallery).kept.tolist() == [single["face_id"]]
    row = {"decision": "ignore", "uri": several[1]["uri"], "box": several[1]["box"]}
    assert add_decisions(gallery, [row]).is_applied
    assert read_decisions(gallery).ignored.tolist() == [several[1]["face_id"]]


def test_a_path_may_be_written_from_the_working_folder_on(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counter(face["uri"] for face in list_faces(gallery))
    path = Path(next(uri for uri, count in sorted(counts.items()) if count == 1))
    monkeypatch.chdir(path.parents[1])
    row = {"decision": "is", "path": f"{path.parent.name}/{path.name}", "person": "Ann"}
    assert add_decisions(gallery, [row]).is_applied
    assert "has no face of the image" in str(add_decisions(gallery, [{**row, "path": path.name}]).problems[0])


def test_decisions_survive_new_face_ids(gallery: Gallery, tmp_path: Path) -> None:
    ids = list_ids(gallery)
    add_decisions(gallery, [is_person(ids[0], "Ann"), pair("same_as", ids[1], ids[2])])
    # The same photos at another place have other ids.
    shutil.copytree(Path(gallery.path).parent / "source", tmp_path / "moved")
    embed(tmp_path / "moved", tmp_path / "new", FAKES)
    shutil.copytree(Path(gallery.path) / "decisions", tmp_path / "new" / "decisions")
    new = Gallery(str(tmp_path / "new"))
    decisions = read_decisions(new)
    by_content = {(face["image_id"], face["face_index"]): face["face_id"] for face in list_faces(new)}
    old = {face["face_id"]: by_content[face["image_id"], face["face_index"]] for face in list_faces(gallery)}
    assert decisions.confirmed.face_id.tolist() == [old[ids[0]]]
    assert set(decisions.same_pairs[0].tolist()) == {old[ids[1]], old[ids[2]]}
    assert not set(old) & set(old.values())


# ---- values


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "no `decision`"),
        ({"decision": ["is"]}, "unknown decision"),
        ({"decision": "is", "face_id": "1"}, "needs a `person`"),
        ({"decision": "is", "person": "A"}, "names no face"),
        ({"decision": "is", "person": True, "face_id": 1}, "not a name"),
        ({"decision": "is", "person": "A\x00", "face_id": 1}, "zero byte"),
        ({"decision": "is", "person": "A" * 2000, "face_id": 1}, "2000 characters"),
        ({"decision": "keep", "face_id": 1 << 63}, "beyond the 63 bits"),
        ({"decision": "keep", "face_id": -1}, "beyond the 63 bits"),
        ({"decision": "keep", "face_id": "9" * 19}, "beyond the 63 bits"),
        ({"decision": "keep", "face_id": "9" * 5000}, "beyond the 63 bits"),
        ({"decision": "keep", "face_id": True}, "not a whole number"),
        ({"decision": "keep", "face_id": 9.2e18}, "rounded"),
        ({"decision": "keep", "face_id": "9.2E+18"}, "rounded"),
        ({"decision": "keep", "face_id": float("inf")}, "rounded"),
        ({"decision": "keep", "face_id": float("nan")}, "names no face"),
        ({"decision": "keep", "image_id": "xyz"}, "not 32 hex digits"),
        ({"decision": "keep", "face_id": 1, "box": [1, 2, float("nan"), 4]}, "not four numbers"),
        ({"decision": "keep", "face_id": 1, "box": [1, 2, 0, 4]}, "no area"),
        ({"decision": "keep", "face_id": 1, "when": "yesterday"}, "ISO 8601"),
        ({"decision": "keep", "face_id": 1, "when": "0001-01-01T00:00:00+23:00"}, "out of range"),
        ({"decision": "keep", "face_id": 1, "why": {"a": 1}}, "not a text"),
        ({"decision": "keep", "face_id": 1, "who": "\ud800"}, "not UTF-8"),
        ({"decision": "same_as", "face_id": 1, "other_face_id": 1}, "needs two faces"),
        ({"decision": "undo"}, "needs `undoes`"),
        ({"decision": "undo", "undoes": "0" * 32, "decision_id": "0" * 32}, "undoes itself"),
    ],
)
def test_values_that_cannot_be_used_are_named(values: Row, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(values)


@given(st.dictionaries(st.sampled_from([*SCHEMA.names, "when", "uri"]), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40), lambda inner: st.lists(inner, max_size=5), max_leaves=6)))  # fmt: skip
def test_any_values_give_a_row_or_a_reason(values: Row) -> None:
    reason = ""
    row = {}
    try:
        row = parse_row(values)
    except RowError as error:
        reason = str(error)
    assert len(reason) < 300
    assert reason.isprintable()
    assert pa.Table.from_pylist([row], SCHEMA).num_rows == 1


def test_face_ids_may_be_text_or_exact_numbers() -> None:
    exact = 9007199254740993
    assert parse_row({"decision": "keep", "face_id": str(exact)})["face_id"] == exact
    assert parse_row({"decision": "keep", "face_id": exact})["face_id"] == exact
    assert parse_row({"decision": "keep", "face_id": 12.0})["face_id"] == 12


def test_the_id_of_a_decision_never_changes() -> None:
    assert compute_decision_id("is", face="1", person="Ann") == "117986905e47a9b7c1a3660ae59860e2"


# ---- writers


def test_two_writers_at_once_both_land(gallery: Gallery) -> None:
    ids = list_ids(gallery)

    def add_some(worker: int) -> None:
        for n in range(3):
            row = {"decision": "keep", "face_id": str(ids[n]), "who": f"worker {worker}"}
            assert add_decisions(gallery.path, [row]).is_applied

    with ThreadPoolExecutor(2) as workers:
        list(workers.map(add_some, range(2)))
    assert len(read_contents(gallery)) == 6
    assert verify_table(gallery.path) == (6, [])


def test_many_small_files_are_joined(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("facepipe.decisions.table._MANY_FILES", 3)
    ids = list_ids(gallery)
    for number in range(5):
        add_decisions(gallery, [is_person(ids[number], f"P{number}")])
    table = DecisionTable(gallery.path)
    assert len(table.files) < 4
    assert table.rows == 5
    assert len(read_decisions(gallery)) == 5
    # What was joined goes, and nothing else.
    with hold_decisions(gallery.path) as writer:
        assert writer.delete_unreferenced() == 3
    assert verify_table(gallery.path) == (5, [])


def test_verify_finds_an_altered_file(gallery: Gallery) -> None:
    add_decisions(gallery, [is_person(list_ids(gallery)[0], "Ann")])
    table = DecisionTable(gallery.path)
    path = Path(table.folder) / table.files[0].path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert any(
        "checksum differs" in problem or "cannot be read" in problem for problem in verify_table(gallery.path)[1]
    )


def test_random_boxes_overlap_with_themselves_only() -> None:
    from facepipe.decisions.resolve import compute_overlaps

    rng = np.random.default_rng(0)
    low = rng.uniform(0, 100, (50, 2)).astype(np.float32)
    boxes = np.concatenate([low, low + rng.uniform(1, 50, (50, 2)).astype(np.float32)], axis=1)
    overlaps = compute_overlaps(boxes, boxes)
    np.testing.assert_allclose(overlaps, 1, rtol=1e-5)
    assert compute_overlaps(boxes, boxes + 1000).max() == 0
    assert compute_overlaps(boxes[:1], np.full((1, 4), np.nan, np.float32))[0] == 0


def test_ids_that_were_rounded_by_javascript_are_unknown_and_not_guessed(gallery: Gallery) -> None:
    face = next(face for face in list_ids(gallery) if face > 1 << 53 and int(float(face)) != face)
    rounded = int(float(face))
    summary = add_decisions(gallery, [{"decision": "keep", "face_id": rounded}])
    assert not summary.is_applied
    assert f"has no face {rounded}" in str(summary.problems[0])


def test_a_face_that_has_left_the_gallery_keeps_its_decision_and_the_file_stays_applicable(
    gallery: Gallery, tmp_path: Path
) -> None:
    face = list_faces(gallery)[0]
    rows = [is_person(face["face_id"], "Ann")]
    add_decisions(gallery, rows)
    # A gallery of other photos, with the same decisions.
    (tmp_path / "source").mkdir()
    source = Path(gallery.path).parent / "source"
    for photo in sorted(source.iterdir())[5:9]:
        shutil.copy(photo, tmp_path / "source")
    embed(tmp_path / "source", tmp_path / "other", FAKES)
    shutil.copytree(Path(gallery.path) / "decisions", tmp_path / "other" / "decisions")
    decisions = read_decisions(str(tmp_path / "other"))
    assert (len(decisions), len(decisions.confirmed.face_id)) == (1, 0)
    assert add_decisions(str(tmp_path / "other"), rows).known == 1
    # The photo comes in, and the decision holds again.
    shutil.copy(source / Path(face["uri"]).name, tmp_path / "source")
    embed(tmp_path / "source", tmp_path / "other", FAKES)
    confirmed = read_decisions(str(tmp_path / "other")).confirmed
    assert confirmed.person.to_pylist() == ["Ann"]
    assert confirmed.face_id.tolist() != [face["face_id"]]
