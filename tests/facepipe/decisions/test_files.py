"""Files of decisions: each kind is read, hostile ones are named line by line, and an export comes back without loss."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from decided import Row, is_person, list_faces, list_ids, make_gallery, pair
from helpers import measure_peak_bytes

from facepipe.decisions import add_decisions, read_decisions, undo_decisions
from facepipe.decisions.apply import apply_files
from facepipe.decisions.export import export_decisions
from facepipe.decisions.files import iterate_file
from facepipe.decisions.table import DecisionTable
from facepipe.errors import ConfigError
from facepipe.gallery import Gallery

ENDINGS = ("jsonl", "csv", "parquet")
HOSTILE = "=cmd|' /C calc'!A0"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("files"))


@pytest.fixture
def gallery(embedded: Path) -> Iterator[Gallery]:
    yield Gallery(str(embedded))
    shutil.rmtree(embedded / "decisions", ignore_errors=True)


def read_contents(gallery: Gallery) -> list[Row]:
    rows = DecisionTable(gallery.path).read().drop_columns(["added_at"]).to_pylist()
    return sorted(rows, key=lambda row: str(row["decision_id"]))


def write_lines(path: Path, *rows: object) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


# ---- round trip


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_export_comes_back_without_loss(gallery: Gallery, tmp_path: Path, ending: str) -> None:
    ids = list_ids(gallery)
    added = add_decisions(
        gallery,
        [
            is_person(
                ids[0], HOSTILE, why='a "quoted", ünïcode\nreason\u2028', when="2026-01-01T00:00:00.000001+02:00"
            ),
            pair("same_as", ids[3], ids[2], who="-me"),
            {"decision": "not_a_face", "face_id": ids[4]},
        ],
        who="eve",
        source="a report",
    )
    undo = undo_decisions(gallery, added.added_ids[:1], who="eve", why="mistake").added_ids
    undo_decisions(gallery, undo)
    before = read_contents(gallery)
    path = str(tmp_path / f"export.{ending}")
    assert export_decisions(gallery, path) == 5
    # Into the same gallery it adds nothing.
    summary = apply_files(gallery, [path], who="another")
    assert (summary.added, summary.refused, summary.known) == ({}, 0, 5)
    # Into a gallery without decisions it brings back all of them.
    shutil.rmtree(Path(gallery.path) / "decisions")
    summary = apply_files(gallery, [path], who="another")
    assert summary.problems == []
    assert read_contents(gallery) == before
    # The file is ours and may be replaced; another one is not.
    assert export_decisions(gallery, path) == 5
    other = tmp_path / f"other.{ending}"
    other.write_text("notes")
    with pytest.raises(ConfigError, match="is no export"):
        export_decisions(gallery, str(other))
    assert other.read_text() == "notes"


def test_cells_of_an_export_are_no_formulas(gallery: Gallery, tmp_path: Path) -> None:
    add_decisions(gallery, [is_person(list_ids(gallery)[0], HOSTILE)], who="@who")
    export_decisions(gallery, str(tmp_path / "export.csv"))
    with open(tmp_path / "export.csv", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(("=", "@", "+", "-")) for cell in cells)
    assert f"'{HOSTILE}" in cells


def test_an_export_has_a_known_ending(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="end the name with"):
        export_decisions(gallery, str(tmp_path / "export.xlsx"))


# ---- kinds of files


def test_files_of_every_kind_are_applied_together(gallery: Gallery, tmp_path: Path) -> None:
    ids = list_ids(gallery)
    header = {"facepipe_decisions": 1, "gallery": "G", "report": "cluster", "table_version": 3}
    lines = write_lines(tmp_path / "a.jsonl", header, is_person(ids[0], "Ann"), "", is_person(ids[1], "Bob"))
    (tmp_path / "b.csv").write_text(f"\ufeffDecision;face_id;person\nis;{ids[2]};Cid\n\n")
    pq.write_table(pa.table({"decision": ["ignore"], "face_id": [ids[3]], "more": [1]}), tmp_path / "c.parquet")
    summary = apply_files(gallery, [lines, str(tmp_path / "b.csv"), str(tmp_path / "c.parquet")], who="me")
    assert summary.problems == []
    assert summary.added == {"is": 3, "ignore": 1}
    assert sorted(read_decisions(gallery).confirmed.person.to_pylist()) == ["Ann", "Bob", "Cid"]
    assert {row["source"] for row in read_contents(gallery)} == {"a.jsonl", "b.csv", "c.parquet"}


def test_relabel_csv_becomes_persons_from_a_probability_on(gallery: Gallery, tmp_path: Path) -> None:
    ids = list_ids(gallery)
    lines = [
        "path,identity,suggested,probability,face_id",
        f"a.jpg,Ann,'=Bob,0.9950,{ids[0]}",
        f"b.jpg,Ann,Cid,0.7,{ids[1]}",
        f"c.jpg,Ann,Cid,many,{ids[2]}",
    ]
    path = tmp_path / "relabel.csv"
    path.write_text("\n".join(lines))
    summary = apply_files(gallery, [str(path)], at_least=0.99, skip_bad=True)
    assert [str(problem) for problem in summary.problems] == ["relabel.csv:4: probability 'many' is not a number"]
    assert read_decisions(gallery).confirmed.person.to_pylist() == ["=Bob"]
    assert read_contents(gallery)[0]["who"] == "facepipe clean"


def test_decisions_of_clean_are_applied_from_a_probability_on(gallery: Gallery) -> None:
    ids = list_ids(gallery)
    report = Path(gallery.path) / "reports" / "clean"
    with pytest.raises(ConfigError, match="has no report of clean"):
        apply_files(gallery, [], from_clean=True, at_least=0.9)
    report.mkdir(parents=True)
    rows = [
        (ids[0], "Ann", "relabel", "Bob", 0.999, 0.999),
        (ids[1], "Ann", "relabel", "Bob", 0.9, 0.9),
        (ids[2], "Ann", "outlier", None, None, 0.995),
        (ids[3], "Ann", "keep", None, None, 0.001),
    ]
    names = ("face_id", "identity", "decision", "suggested", "suggested_probability", "noise")
    pq.write_table(
        pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), report / "decisions.parquet"
    )
    try:
        with pytest.raises(ConfigError, match="--at-least"):
            apply_files(gallery, [], from_clean=True)
        summary = apply_files(gallery, [], from_clean=True, at_least=0.99)
    finally:
        shutil.rmtree(report.parent)
    assert summary.added == {"is": 1, "is_not": 1}
    decisions = read_decisions(gallery)
    assert decisions.confirmed.face_id.tolist() == [ids[0]]
    assert decisions.rejected.face_id.tolist() == [ids[2]]


def test_a_folder_sorted_by_hand(gallery: Gallery, tmp_path: Path) -> None:
    source = Path(gallery.path).parent / "source"
    faces = list_faces(gallery)
    counts: dict[str, int] = {}
    for face in faces:
        counts[Path(face["uri"]).name] = counts.get(Path(face["uri"]).name, 0) + 1
    single = sorted(name for name, count in counts.items() if count == 1)
    double = sorted(name for name, count in counts.items() if count == 2)
    (tmp_path / "Ann" / "old").mkdir(parents=True)
    (tmp_path / "Bob").mkdir()
    shutil.copy(source / single[0], tmp_path / "Ann" / "old" / "renamed.png")  # found by its bytes
    (tmp_path / "Bob" / single[1]).write_bytes(b"exported by another program")  # found by its name
    shutil.copy(source / double[0], tmp_path / "Bob" / double[0])
    (tmp_path / "Bob" / "unknown.jpg").write_bytes(b"?")
    (tmp_path / "Bob" / "Thumbs.db").write_bytes(b"?")
    summary = apply_files(gallery, [str(tmp_path)], skip_bad=True)
    reasons = sorted(str(problem) for problem in summary.problems)
    assert len(reasons) == 2
    assert "has 2 faces" in reasons[0]
    assert reasons[1] == "Bob/unknown.jpg: the gallery has no face of an image with these bytes or this name"
    assert (summary.by_content, summary.by_name, summary.ignored) == (2, 1, 1)
    confirmed = read_decisions(gallery).confirmed
    uris = {face["face_id"]: Path(face["uri"]).name for face in faces}
    named = dict(zip(map(uris.__getitem__, confirmed.face_id.tolist()), confirmed.person.to_pylist(), strict=True))
    assert named == {single[0]: "Ann", single[1]: "Bob"}


# ---- hostile input


def test_bad_lines_are_named_and_the_others_applied(gallery: Gallery, tmp_path: Path) -> None:
    good = is_person(list_ids(gallery)[0], "Ann")
    path = tmp_path / "bad.jsonl"
    lines = [
        json.dumps(good).encode(),
        b'{"decision": "is", "face_id": "1',
        b'{"decision": "keep", "face_id": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"7",
        b'{"decision": "keep", "face_id": 9223372036854775808}',
        b'{"decision": "is", "face_id": {"a": 1}, "person": "x"}',
        b"",
        json.dumps({**good, "decision": "keep", "extra": [1]}).encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    assert not apply_files(gallery, [str(path)]).is_applied
    summary = apply_files(gallery, [str(path)], skip_bad=True)
    assert summary.is_applied
    assert [problem.place for problem in summary.problems] == [f"bad.jsonl:{line}" for line in range(2, 9)]
    assert sum(summary.added.values()) == 2
    # A file of a later format is not guessed at.
    newer = write_lines(tmp_path / "newer.jsonl", {"facepipe_decisions": 2}, good)
    assert "a newer facepipe reads" in str(apply_files(gallery, [newer]).problems[0])


def test_a_line_of_a_hundred_megabytes_is_named_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"decision": "keep", "face_id": "1", "why": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"decision": "keep", "face_id": "1"}')
    rows, peak = measure_peak_bytes(lambda: list(iterate_file(str(path))))
    assert [row.values is None for row in rows] == [True, False]
    assert rows[1].place == "long.jsonl:2"
    assert peak < 20_000_000


def test_csv_of_any_content_ends_in_rows_or_reasons(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b'decision,face_id,person\nis,1,"open quote\nis,2,B\n' + b"x" * 300_000)
    rows = list(iterate_file(str(path)))
    assert "not CSV" in rows[-1].error
    path.write_bytes(b"decision,face_id\nkeep,1,2,3\n\xff,1\nkeep,\x00\n")
    rows = list(iterate_file(str(path)))
    assert [bool(row.error) for row in sorted(rows, key=lambda row: row.place)] == [True, True, False]
    path.write_bytes(b"name,age\nAnn,7\n")
    with pytest.raises(ConfigError, match="no column `decision`"):
        list(iterate_file(str(path)))


def test_columns_of_wrong_types_are_named(gallery: Gallery, tmp_path: Path) -> None:
    path = tmp_path / "wrong.parquet"
    pq.write_table(pa.table({"decision": ["keep", "keep"], "face_id": [float(list_ids(gallery)[0]), None]}), path)
    reasons = [str(problem) for problem in apply_files(gallery, [str(path)]).problems]
    assert "was rounded" in reasons[0]
    assert "names no face" in reasons[1]
    pq.write_table(pa.table({"uri": ["a"]}), path)
    with pytest.raises(ConfigError, match="no column `decision`"):
        apply_files(gallery, [str(path)])


def test_nothing_and_missing_files_are_refused(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="say what to apply"):
        apply_files(gallery, [])
    with pytest.raises(ConfigError, match="no file or folder"):
        apply_files(gallery, [str(tmp_path / "absent.csv")])
    (tmp_path / "empty.jsonl").touch()
    assert apply_files(gallery, [str(tmp_path / "empty.jsonl")]).rows == 0
    with pytest.raises(ConfigError, match="one object per line"):
        apply_files(gallery, [write_lines(tmp_path / "list.json", [{}])])
