"""OpenLineage events: what a run read and wrote, without names, and never at the cost of the run."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import run_facepipe

from facepipe.errors import ConfigError
from facepipe.gallery import Gallery
from facepipe.observe.lineage import LineageSender, make_run_uuid
from facepipe.observe.runs import RunRecord
from pipelines.runtime.run_record import set_lineage_target

pytest.importorskip("openlineage", reason="needs the extra `openlineage`")

FAKES = ["--detector", "fake-detector", "--embedder", "fake-embedder", "--runner", "inline", "--quiet"]


class Receiver:
    """A receiver that keeps what is posted, and answers with a status."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.status = 201
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.events.append(json.loads(body))
                receiver.keys.append(self.headers["Authorization"])
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever)
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _stop_sending(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OPENLINEAGE_PARENT_ID", raising=False)
    yield
    set_lineage_target(None)


def read_events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_embedding_is_two_events_with_counts_and_columns(drawings: Path, tmp_path: Path) -> None:
    events_file = tmp_path / "events.jsonl"
    gallery = tmp_path / "g"
    words = ["--openlineage", events_file, "embed", drawings, gallery, "--identity", "folder", *FAKES]
    assert run_facepipe(*words)[0] == 0
    start, complete = read_events(events_file)
    assert (start["eventType"], complete["eventType"]) == ("START", "COMPLETE")
    assert start["run"]["runId"] == complete["run"]["runId"]
    assert complete["job"]["namespace"] == "facepipe"
    assert complete["job"]["name"] == f"{gallery}.embed"
    figures = complete["run"]["facets"]["facepipe"]
    assert figures["counters"]["images"] == 60
    assert figures["exitCode"] == 0
    (output,) = complete["outputs"]
    assert (output["namespace"], output["name"]) == ("file", f"{gallery}/faces")
    columns = {column["name"]: column["type"] for column in output["facets"]["schema"]["fields"]}
    assert columns["det_score"] == "float"
    assert output["outputFacets"]["outputStatistics"]["rowCount"] == Gallery(gallery).to_arrow(["uri"]).num_rows
    assert output["facets"]["version"]["datasetVersion"] == str(Gallery(gallery).version)
    # Neither an image, nor the folder of the photos, nor a person is named.
    text = events_file.read_text()
    assert str(drawings) not in text
    assert "person1" not in text
    assert ".png" not in text


def test_steps_of_a_night_name_it(drawings: Path, tmp_path: Path) -> None:
    config = tmp_path / "nightly.toml"
    config.write_text(
        f'gallery = "{tmp_path}/g"\n[[source]]\nuri = "{drawings}"\nidentity = "folder"\n'
        '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    )
    events_file = tmp_path / "events.jsonl"
    assert run_facepipe("--openlineage", events_file, "nightly", config, "--quiet")[0] == 0
    events = read_events(events_file)
    night = [event for event in events if event["job"]["name"].endswith(".nightly")]
    steps = [event for event in events if event not in night]
    assert [event["eventType"] for event in night] == ["START", "COMPLETE"]
    assert {event["job"]["name"].rpartition(".")[2] for event in steps} >= {"embed", "index", "dedup_new"}
    for step in steps:
        parent = step["run"]["facets"]["parent"]
        assert parent["run"]["runId"] == night[0]["run"]["runId"]
        assert parent["job"]["name"] == f"{tmp_path}/g.nightly"


def test_a_scheduler_is_the_parent(drawings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = "0199d8a1-0000-7000-8000-000000000001"
    monkeypatch.setenv("OPENLINEAGE_PARENT_ID", f"airflow/faces.nightly/{run}")
    monkeypatch.setenv("FACEPIPE_OPENLINEAGE", str(tmp_path / "events.jsonl"))
    assert run_facepipe("embed", drawings, tmp_path / "g", *FAKES)[0] == 0
    parent = read_events(tmp_path / "events.jsonl")[0]["run"]["facets"]["parent"]
    assert (parent["run"]["runId"], parent["job"]["name"]) == (run, "faces.nightly")


def test_a_failure_names_the_class_of_the_error_alone(tmp_path: Path) -> None:
    events_file = tmp_path / "events.jsonl"
    missing = tmp_path / "Jane Doe.jpg"
    assert run_facepipe("--openlineage", events_file, "embed", missing, tmp_path / "g", *FAKES)[0] == 1
    fail = read_events(events_file)[-1]
    assert fail["eventType"] == "FAIL"
    assert fail["run"]["facets"]["errorMessage"]["message"] == "SourceError"
    assert "Jane" not in events_file.read_text()


@pytest.mark.parametrize(
    ("state", "kind"),
    [("running", "START"), ("done", "COMPLETE"), ("over_budget", "COMPLETE"), ("interrupted", "ABORT")],
)
def test_every_state_has_its_event(state: Any, kind: str, receiver: Receiver) -> None:
    record = RunRecord("20261201T020000-abcdef", "search", started="2026-12-01T02:00:00Z", state=state)
    assert LineageSender(receiver.url).send("s3://user:secret@bucket/gallery", record)
    (event,) = receiver.events
    assert event["eventType"] == kind
    assert event["run"]["runId"] == str(make_run_uuid(record.run))
    assert "secret" not in json.dumps(event)


def test_a_receiver_gets_its_key_and_every_event(
    drawings: Path, tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "key-of-the-receiver")
    assert run_facepipe("--openlineage", receiver.url, "embed", drawings, tmp_path / "g", *FAKES)[0] == 0
    assert [event["eventType"] for event in receiver.events] == ["START", "COMPLETE"]
    assert receiver.keys == ["Bearer key-of-the-receiver"] * 2


def test_a_receiver_that_fails_does_not_fail_the_run(
    drawings: Path, tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = 500
    code, _, error = run_facepipe("--openlineage", receiver.url, "embed", drawings, tmp_path / "g", *FAKES)
    assert code == 0
    assert "could not send an OpenLineage event; the results of this run are not affected" in error
    # Nobody listens there any more. After three failures in a row nothing is tried.
    sender = LineageSender("http://127.0.0.1:9")
    record = RunRecord("20261201T020000-abcdef", "search", started="2026-12-01T02:00:00Z")
    with caplog.at_level(logging.CRITICAL):
        assert [sender.send("g", record) for _ in range(5)] == [False] * 5
    assert sender.failures == 3


@pytest.mark.parametrize("target", ["", "kafka://host/topic", "/no/such/folder/events.jsonl"])
def test_a_wrong_target_is_refused_before_the_work(target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--openlineage"):
        LineageSender(target)
    if target:
        code, _, error = run_facepipe("--openlineage", target, "embed", tmp_path, tmp_path / "g", *FAKES)
        assert (code, "--openlineage" in error) == (2, True)
