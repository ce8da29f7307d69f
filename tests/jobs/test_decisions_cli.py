"""`facepipe apply` and `facepipe decisions`: look, decide, apply, take back, export."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from decided import is_person, list_ids, make_gallery
from helpers import run_facepipe

from facepipe.gallery import Gallery


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("cli"), images=8)


@pytest.fixture
def gallery(embedded: Path) -> Iterator[Path]:
    yield embedded
    shutil.rmtree(embedded / "decisions", ignore_errors=True)


def test_apply_list_undo_export(gallery: Path, tmp_path: Path) -> None:
    ids = list_ids(Gallery(str(gallery)))
    file = tmp_path / "decisions.jsonl"
    file.write_text("\n".join(map(json.dumps, [is_person(ids[0], "Ann\x1b[31m"), is_person(ids[1], "Bob")])))
    assert run_facepipe("decisions", gallery)[1].startswith("nobody has decided anything")
    code, out, _ = run_facepipe("apply", gallery, file, "--dry-run")
    assert (code, "dry run" in out) == (0, True)
    code, out, _ = run_facepipe("apply", gallery, file, "--who", "eve", "--json")
    assert code == 0
    assert json.loads(out)["added"] == {"is": 2}
    code, out, _ = run_facepipe("decisions", gallery)
    assert "Bob" in out
    assert "\x1b" not in out
    listed = json.loads(run_facepipe("decisions", gallery, "--json")[1])["decisions"]
    bob = next(row for row in listed if row["person"] == "Bob")
    assert (bob["face_id"], bob["who"], bob["state"]) == (str(ids[1]), "eve", "active")
    code, out, _ = run_facepipe("decisions", gallery, "--undo", bob["decision_id"][:12])
    assert (code, "brings it back" in out) == (0, True)
    assert json.loads(run_facepipe("decisions", gallery, "--json")[1])["total"] == 1
    assert json.loads(run_facepipe("decisions", gallery, "--all", "--json")[1])["total"] == 3
    assert json.loads(run_facepipe("decisions", gallery, "--all", "--person", "Bob", "--json")[1])["total"] == 1
    code, out, _ = run_facepipe("decisions", gallery, "--export", tmp_path / "export.csv")
    assert (code, out.startswith("3 decisions")) == (0, True)
    assert "decisions" in run_facepipe("info", gallery)[1]
    assert json.loads(run_facepipe("info", gallery, "--json")[1])["decisions"]["is"] == 1
    assert json.loads(run_facepipe("verify", gallery, "--json")[1])["decisions"] == 3


def test_refused_rows_are_named_and_say_what_to_do(gallery: Path, tmp_path: Path) -> None:
    ids = list_ids(Gallery(str(gallery)))
    file = tmp_path / "decisions.jsonl"
    file.write_text("\n".join(map(json.dumps, [is_person(ids[0], "Ann"), is_person(ids[0], "Bob"), is_person(3, "C")])))
    code, out, err = run_facepipe("apply", gallery, file)
    assert code == 1
    assert "nothing applied" in out
    assert "decisions.jsonl:3: the gallery has no face 3" in err
    assert "conflict: face" in err
    assert "--skip-bad" in err
    assert "--replace" in err
    file.write_text("\n".join(map(json.dumps, [is_person(ids[0], "Ann"), is_person(3, "C")])))
    code, out, err = run_facepipe("apply", gallery, file, "--skip-bad")
    assert code == 3
    assert "1 rows were refused" in err
    assert json.loads(run_facepipe("decisions", gallery, "--json")[1])["total"] == 1


def test_wrong_usage_is_explained(gallery: Path, tmp_path: Path) -> None:
    assert run_facepipe("apply", gallery)[0] == 2
    assert run_facepipe("apply", gallery, "--from-clean")[0] == 2
    assert run_facepipe("apply", gallery, tmp_path / "absent")[0] == 2
    assert run_facepipe("apply", tmp_path / "absent", "x")[0] == 1
    assert run_facepipe("decisions", gallery, "--undo", "abcdef123456")[0] == 2
    assert run_facepipe("decisions", gallery, "--undo", "abcdef123456", "--export", "x.csv")[0] == 2
