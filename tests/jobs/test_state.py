"""What a gallery lacks and what its runs did: stale indexes warn, `verify` tells sound from complete, `info` knows ends."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import run_facepipe

import facepipe
from facepipe.gallery import Gallery
from facepipe.observe import runs
from facepipe.observe.runs import RunRecord
from facepipe.provenance import describe_making, set_command
from facepipe.storage.lease import describe_process, has_process_ended

FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


@pytest.fixture(scope="module")
def indexed(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 drawings in a gallery with an index, and 4 more in a folder beside them."""
    root = tmp_path_factory.mktemp("state")
    paths = [path for path in sorted(drawings.rglob("*.png")) if int(path.stem[-3:]) % 3]
    for number, path in enumerate(paths[:16]):
        place = root / ("photos" if number < 12 else "more") / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    assert run_facepipe("embed", root / "photos", root / "g", *FAKES)[0] == 0
    assert run_facepipe("index", root / "g", "--quiet")[0] == 0
    return root


@pytest.fixture
def grown(indexed: Path, tmp_path: Path) -> Path:
    """The same with the further drawings embedded, and not indexed."""
    shutil.copytree(indexed, tmp_path / "grown")
    assert run_facepipe("embed", tmp_path / "grown" / "more", tmp_path / "grown" / "g", *FAKES)[0] == 0
    return tmp_path / "grown"


def count_new(folder: Path) -> int:
    return sum(1 for row in Gallery(str(folder / "g")).to_arrow(["source", "face_id"], "source = 'more'").to_pylist())


def test_commands_warn_of_an_index_behind_the_table(grown: Path, tmp_path: Path) -> None:
    new = count_new(grown)
    faces = Gallery(str(grown / "g")).counts()["faces"]
    warning = f"the index lacks {new} of {faces} faces of the gallery: run `facepipe index {grown}/g`"
    for words in (["search", "o.parquet"], ["identify", "o.csv", "--threshold", "0.3"]):
        out = tmp_path / words[1]
        code, stdout, err = run_facepipe(words[0], grown / "g", grown / "more", out, *words[2:], "--json", "--quiet")
        assert (code, warning in err, json.loads(stdout)["lacking"]) == (0, True, new), err
        assert any(warning in note for note in json.loads(stdout)["notes"])
    code, stdout, _ = run_facepipe("info", grown / "g", "--json")
    state = json.loads(stdout)["index"]
    assert (state["up to date"], state["lacks faces"]) == (False, new)


def test_verify_tells_sound_from_complete(indexed: Path, grown: Path) -> None:
    code, out, _ = run_facepipe("verify", indexed / "g")
    assert (code, "sound: " in out, "complete: the index holds every face" in out) == (0, True, True)
    code, out, _ = run_facepipe("verify", grown / "g")
    assert (code, "sound: " in out, "not complete: the index lacks" in out) == (0, True, True)
    code, out, _ = run_facepipe("verify", grown / "g", "--json")
    assert (json.loads(out)["complete"], len(json.loads(out)["gaps"])) == (False, 1)
    assert run_facepipe("index", grown / "g", "--quiet")[0] == 0
    assert json.loads(run_facepipe("verify", grown / "g", "--json")[1])["complete"]
    shutil.rmtree(grown / "g" / "index")
    assert "there is no index of the" in run_facepipe("verify", grown / "g")[1]


def test_changes_that_no_search_sees_give_no_warning(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed, tmp_path / "same")
    gallery = tmp_path / "same" / "g"
    assert run_facepipe("compact", gallery, "--all")[0] == 0
    assert run_facepipe("embed", indexed / "photos", gallery, *FAKES)[0] == 0
    state = json.loads(run_facepipe("info", gallery, "--json")[1])["index"]
    assert (state["up to date"], state["lacks faces"]) == (True, 0)
    _, _, err = run_facepipe("search", gallery, gallery, tmp_path / "o.parquet", "--quiet")
    assert err == ""


def test_a_label_that_changed_is_a_face_that_the_index_lacks(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed, tmp_path / "same")
    # Left of the last _ in the files' names stands another label than the folder's.
    words = ["embed", indexed / "photos", tmp_path / "same" / "g", *FAKES, "--identity", "filename"]
    assert run_facepipe(*words)[0] == 0
    state = json.loads(run_facepipe("info", tmp_path / "same" / "g", "--json")[1])["index"]
    assert not state["up to date"]


# ------------------------------------------------------------------------------------------------------------------- runs


def describe_runs(gallery: Path) -> dict[str, dict[str, Any]]:
    return {run["run"]: run for run in json.loads(run_facepipe("info", gallery, "--json")[1])["runs"]}


def test_a_killed_run_is_interrupted_with_its_times(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed, tmp_path / "killed")
    gallery = tmp_path / "killed" / "g"
    # A process that begins a run and is killed in it.
    code = (
        "import sys, time\nfrom pipelines.runtime.run_record import record_run\n"
        "with record_run(sys.argv[1], 'index') as run:\n    print(run.id, flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(gallery)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        described = describe_runs(gallery)[run]
        assert (described["state"], described["ended"], described["seconds"]) == ("running", None, None)
        process.send_signal(signal.SIGKILL)
        process.wait()
    described = describe_runs(gallery)[run]
    assert described["state"] == "interrupted"
    assert described["ended"] >= described["started"]
    assert described["seconds"] >= 0
    _, out, _ = run_facepipe("info", gallery)
    assert "running" not in out


def test_a_run_of_another_machine_goes_on_while_a_lease_is_held(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed, tmp_path / "other")
    gallery = tmp_path / "other" / "g"
    run = runs.new_run_id()
    elsewhere = {"machine": "another machine", "pid": 1, "began": "1"}
    runs.write_record(str(gallery), RunRecord(run, "embed", started=runs.format_now(), process=elsewhere))
    assert describe_runs(gallery)[run]["state"] == "interrupted"
    holder = {"holder": "x", "host": "elsewhere", **elsewhere, "seconds": 60.0}
    (gallery / ".lock").write_text(json.dumps(holder))
    assert describe_runs(gallery)[run]["state"] == "running"


def test_processes_are_told_apart() -> None:
    own = describe_process()
    assert has_process_ended(own) is False
    assert has_process_ended({**own, "began": "0"}) is True
    assert has_process_ended({**own, "machine": "another"}) is None
    assert has_process_ended({}) is None
    assert own["pid"] == os.getpid()


def test_a_night_over_budget_says_how_many_failed(indexed: Path, tmp_path: Path) -> None:
    shutil.copytree(indexed / "photos", tmp_path / "photos")
    for number in range(3):
        (tmp_path / "photos" / f"bad{number}.jpg").write_bytes(b"no image %d" % number)
    text = '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    (tmp_path / "night.toml").write_text(f'gallery = "g"\n[[source]]\nuri = "photos"\n{text}')
    assert run_facepipe("nightly", tmp_path / "night.toml", "--quiet")[0] == 3
    (night,) = [run for run in describe_runs(tmp_path / "g").values() if run["job"] == "nightly"]
    assert (night["state"], night["failed"]) == ("over_budget", 3)


# ---------------------------------------------------------------------------------------------------------------- reports


def test_reports_say_when_and_how_they_were_made_and_if_they_are_stale(grown: Path) -> None:
    gallery = grown / "g"
    command = ["dedup", str(gallery), "--quiet", "--set", "graph.threshold=0.3"]
    ended = subprocess.run([sys.executable, "-m", "jobs.cli", *command], check=True, capture_output=True, text=True)
    assert ended.returncode == 0
    (report,) = json.loads(run_facepipe("info", gallery, "--json")[1])["reports"]
    assert (report["report"], report["up to date"]) == ("dedup", True)
    assert report["command"] == f"facepipe {' '.join(command)}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", report["made"])
    page = (gallery / "reports" / "dedup" / "report.html").read_text()
    assert re.search(rf"Made [-0-9]+ [:0-9]+ UTC by facepipe {re.escape(facepipe.__version__)}: facepipe dedup", page)
    # A report older than the gallery is stale. One of an older facepipe says nothing of itself.
    assert run_facepipe("embed", grown / "more", gallery, *FAKES, "--identity", "filename")[0] == 0
    _, out, _ = run_facepipe("info", gallery)
    assert "stale, make it again" in out
    assert f"facepipe {facepipe.__version__}" in out
    (gallery / "reports" / "dedup" / "mark.json").unlink()
    (gallery / "reports" / "dedup" / "facepipe.json").write_text('{"format": 1, "report": "dedup"}')
    (report,) = json.loads(run_facepipe("info", gallery, "--json")[1])["reports"]
    assert (report["made"], report["up to date"]) == ("", None)


def test_a_command_is_recorded_without_credentials() -> None:
    try:
        set_command(["facepipe", "cluster", "https://user:secret@host/gallery", "x" * 5000])
        assert "secret" not in describe_making()
        assert len(describe_making()) < 500
        for words in (["erase", "g", "--identity", "Ann"], ["dedup", "g", "--where=identity = 'Ann'"]):
            set_command(["facepipe", "--log-format", "json", *words])
            assert "Ann" not in describe_making()
            set_command(["facepipe", *words])
            assert f"facepipe {words[0]} …" in describe_making()
            assert "Ann" not in describe_making()
    finally:
        set_command([])
    assert describe_making().endswith(f"facepipe {facepipe.__version__}")
