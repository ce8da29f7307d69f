"""What a run leaves for those who watch it: records that survive anything, logs without names, metrics that parse."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pytest
from conftest import REPOSITORY
from helpers import embed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from facepipe import storage
from facepipe.errors import ConfigError, GalleryError, ModelError, StorageError
from facepipe.gallery import Gallery
from facepipe.gallery.commits.parts import PartRecord
from facepipe.observe import logs, metrics, runs
from facepipe.observe.runs import RunRecord
from facepipe.storage.redact import HIDDEN, redact
from pipelines.runtime import ray_metrics
from pipelines.runtime.run_record import attach_summary, get_current_run, record_calls, record_run, set_metrics_file

Settings = dict[str, Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every test begins and ends with unconfigured logs."""
    yield
    logger = logs.get_logger()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def log() -> io.StringIO:
    stream = io.StringIO()
    logs.configure_logs("json", stream=stream)
    return stream


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.get_host_and_port()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage.open_bucket.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="faces")
    client.put_object(Bucket="faces", Key="g/faces/_delta_log/00000000000000000000.json", Body=b"{}")
    yield "s3://faces/g"
    client.close()
    server.stop()
    storage.open_bucket.cache_clear()


@pytest.fixture
def gallery(tmp_path: Path) -> str:
    """What a gallery looks like from outside."""
    (tmp_path / "g" / "faces" / "_delta_log").mkdir(parents=True)
    return str(tmp_path / "g")


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def ended(run: str, job: str = "embed", state: runs.State = "done", **values: Any) -> RunRecord:
    began = f"2026-01-01T00:00:{int(run[13:15]):02d}.000Z"
    code = {"done": 0, "over_budget": 3}.get(state, 1)
    return RunRecord(run, job, None, began, "2026-01-01T01:00:00.500Z", state, code, **values)


def run_id(n: int) -> str:
    return f"20260101T0000{n:02d}-{n:06x}"


# Records


def check_records(gallery: str) -> None:
    assert runs.read_newest(gallery, 5) == []
    assert runs.read_job_histories(gallery) == {}
    assert runs.prune_records(gallery, 0) == 0
    for n in (3, 1, 2):
        runs.write_record(gallery, ended(run_id(n), counters={"images": n, "status.ok": n}))
    runs.write_record(gallery, RunRecord(run_id(4), "index", started=runs.format_now()))
    assert [record.run for record in runs.read_newest(gallery, 2)] == [run_id(4), run_id(3)]
    assert runs.read_newest(gallery, 9)[-1] == ended(run_id(1), counters={"images": 1, "status.ok": 1})
    runs.write_record(gallery, ended(run_id(5), state="over_budget"))
    assert runs.prune_records(gallery, 2) == 3
    assert [record.run for record in runs.read_newest(gallery, 9)] == [run_id(5), run_id(4)]
    (job, found), *others = runs.read_job_histories(gallery).items()
    assert (job, found.ended.run, others) == ("embed", run_id(5), [])
    assert found.success
    assert found.success.run == run_id(2)  # the last that was written: it is pruned, and still known


def test_records_in_a_folder(tmp_path: Path) -> None:
    check_records(str(tmp_path))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        f"{run_id(4)}.json",
        f"{run_id(5)}.json",
        "last-embed.json",
    ]


def test_records_in_an_object_store(bucket: str) -> None:
    check_records(bucket)
    with record_run(bucket, "search") as run:
        assert runs.read_newest(bucket, 1)[0].state == "running"
    assert runs.read_newest(bucket, 1)[0].run == run.id
    with record_run("s3://faces/nothing", "search"):
        pass
    assert list(storage.list_prefix("s3://faces/nothing")) == []


def test_ids_sort_by_time_and_damaged_records_are_passed_over(tmp_path: Path) -> None:
    runs.write_record(str(tmp_path), ended(run_id(1)))
    folder = tmp_path / "runs"
    (folder / f"{run_id(2)}.json").write_text('{"run": ')
    (folder / f"{run_id(3)}.json").write_text("[]")
    (folder / f"{run_id(4)}.json").write_text('{"run": "x", "job": "../x"}')
    (folder / f"{run_id(5)}.json").write_text(json.dumps({"run": run_id(5), "job": "embed", "started": "yesterday"}))
    (folder / f"{run_id(6)}.json").write_text(json.dumps({**vars(ended(run_id(6))), "of_a_later_version": 1}))
    (folder / f"{run_id(7)}").mkdir()  # marks of embed
    (folder / "last-index.json").write_text("null")
    assert [record.run for record in runs.read_newest(str(tmp_path), 9)] == [run_id(6), run_id(1)]
    assert list(runs.read_job_histories(str(tmp_path))) == ["embed"]
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{6}", runs.new_run_id())


def test_a_record_of_a_run(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    gallery = str(tmp_path / "g")
    with record_run(gallery, "embed") as run:
        assert get_current_run() is run
        summary = embed(drawings, gallery, fakes)
        assert run.save()
        (running,) = runs.read_newest(gallery, 1)
        assert (running.run, running.state, running.ended, running.exit_code) == (run.id, "running", None, None)
        run.attach_summary(summary)
        run.add_seconds("commit", 0.25)
        run.set_versions(before=0)
        run.set_gallery_counts(Gallery(gallery).counts())
        run.add_count("status", 2, status="person0/p0_000.png")
    assert get_current_run() is None
    found = next(record for record in runs.read_newest(gallery, 9) if record.run == run.id)
    assert (found.state, found.exit_code, found.error) == ("done", 0, None)
    assert found.counters["images"] == 60
    assert found.counters["status.ok"] == 40
    assert found.counters["gallery.no_face"] == 20
    assert found.counters["status.other"] == 2  # what is no word may be a name
    assert found.version_after == summary.version
    assert found.version_before == 0
    assert set(found.stage_seconds) == set(summary.stage_seconds)
    assert found.duration is not None
    assert found.duration >= 0
    assert "p0_000" not in json.dumps(vars(found))


class Terminated(BaseException):
    """As jobs.console raises it."""


class Exit(RuntimeError):  # noqa: N818
    """As typer raises it."""

    exit_code = 3


@pytest.mark.parametrize(
    ("error", "state", "code", "name"),
    [
        (KeyboardInterrupt(), "interrupted", 130, None),
        (Terminated(), "interrupted", 143, None),
        (GalleryError("/home/ada/lovelace.png is gone"), "failed", 1, "GalleryError"),
        (ConfigError("no"), "failed", 2, "ConfigError"),
        (ValueError("lovelace"), "failed", 1, "ValueError"),
        (Exit(), "over_budget", 3, None),
        (SystemExit(0), "done", 0, None),
        (SystemExit(4), "failed", 4, "SystemExit"),
        (SystemExit("lovelace"), "failed", 1, "SystemExit"),
    ],
)
def test_how_runs_end(
    error: BaseException, state: str, code: int, name: str | None, log: io.StringIO, gallery: str
) -> None:
    with pytest.raises(type(error)), record_run(gallery, "clean"):
        raise error
    (record,) = runs.read_newest(gallery, 5)
    assert (record.state, record.exit_code, record.error) == (state, code, name)
    assert "lovelace" not in Path(gallery, "runs", f"{record.run}.json").read_text() + log.getvalue()
    assert [line["event"] for line in lines(log)] == ["run.started", "run.ended"]
    assert lines(log)[-1]["run"] == record.run


def test_runs_inside_runs(gallery: str) -> None:
    with record_run(gallery, "nightly") as night:
        with record_run(gallery, "embed") as first:
            with record_run(gallery + "/", "embed") as same:  # a pipeline inside its own command
                same.add_count("images", 3)
            assert same is first
            assert runs.read_newest(gallery, 1)[0].state == "running"
        with pytest.raises(ValueError, match="x"), record_run(gallery, "index"):
            raise ValueError("x")
    found = {record.job: record for record in runs.read_newest(gallery, 9)}
    assert {job: (r.parent, r.state) for job, r in found.items()} == {
        "nightly": (None, "done"),
        "embed": (night.id, "done"),
        "index": (night.id, "failed"),
    }
    assert found["embed"].counters == {"images": 3}
    with record_run(gallery, "search", parent="20260101T000000-abcdef") as run:
        pass
    assert run.record.parent == "20260101T000000-abcdef"


@dataclass
class Found:
    pairs: dict[str, int]
    groups: int = 0
    recall: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)


@record_calls("dedup")
def dedup(config: int, gallery: str, fails: bool = False) -> Found:
    """Finds."""
    summary = Found({"exact": 3}, 2, seconds={"graph": 0.5})
    attach_summary(summary)
    if fails:
        raise ValueError("x")
    return summary


def test_a_pipeline_that_records_itself(gallery: str) -> None:
    assert (dedup(1, gallery=gallery).groups, dedup.__doc__) == (2, "Finds.")
    with pytest.raises(ValueError, match="x"):
        dedup(1, gallery, fails=True)
    for record in runs.read_newest(gallery, 5):
        assert record.counters == {"pair.exact": 3, "groups": 2}
        assert record.seconds == {"graph": 0.5}
    assert sorted(record.state for record in runs.read_newest(gallery, 5)) == ["done", "failed"]
    attach_summary(Found({}))  # outside a run: nobody's


def test_a_mistyped_gallery_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GalleryError), record_run(str(tmp_path / "typo"), "index"):
        Gallery(str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()
    (tmp_path / "other").mkdir()
    with record_run(str(tmp_path / "other"), "index"):
        pass
    assert list((tmp_path / "other").iterdir()) == []
    with record_run(str(tmp_path / "new"), "embed") as run:  # the run makes it: recorded from then on
        assert not run.save()
        (tmp_path / "new" / "faces" / "_delta_log").mkdir(parents=True)
        assert run.save()
    assert runs.read_newest(str(tmp_path / "new"), 1)[0].state == "done"


def test_what_cannot_be_recorded_is_a_warning(log: io.StringIO, gallery: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path(gallery, "runs").write_text("in the way")
    with record_run(gallery, "embed") as run:
        run.add_count("images", 3)
    assert [(line["event"], line["level"]) for line in lines(log)] == [
        ("run.started", "info"),
        ("run.ended", "info"),
        ("run.unrecorded", "warning"),
    ]
    Path(gallery, "runs").unlink()

    def refuse(*_: Any) -> None:
        raise StorageError("no")

    monkeypatch.setattr(runs, "prune_records", refuse)
    with record_run(gallery, "embed"):
        pass
    assert lines(log)[-1]["event"] == "run.unpruned"


# Logs


def test_lines_are_json_with_time_run_and_job(log: io.StringIO) -> None:
    with logs.bind_run("20260101T000000-abcdef", "embed"):
        logs.log_event("index.published", vectors=12, gallery="s3://key:secret/x@bucket/g", factory="IVF64,SQ8")
        logs.get_logger("facepipe.index").warning("lock.waited", extra={"seconds": 3.5, "ok": True})
    logs.log_event("outside")
    first, second, third = lines(log)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first.pop("ts"))
    assert first == {
        "level": "info",
        "logger": "facepipe",
        "run": "20260101T000000-abcdef",
        "job": "embed",
        "event": "index.published",
        "vectors": 12,
        "gallery": "s3://***@bucket/g",
        "factory": "IVF64,SQ8",
    }
    assert (second["logger"], second["level"], second["seconds"], second["ok"]) == (
        "facepipe.index",
        "warning",
        3.5,
        True,
    )
    assert (third["run"], third["job"]) == (None, None)


NAMES = "/photos/Ada Lovelace/1.png"


@pytest.mark.parametrize(
    "fields",
    [
        *({name: NAMES} for name in ("uri", "path", "identity", "name", "thumb", "anything", "error", "status", "run")),
        {"error": StorageError(NAMES)},
        {"embedding": [0.25, 0.5]},
        {"counters": {NAMES: 3, "ok": 2}},
        {"identities": {"Ada": 3}},
        {"face_id": 123456789},
        {"message": NAMES},
        {NAMES: 1},
        {"stack": NAMES, "at": NAMES},
    ],
)
def test_no_field_names_a_face(fields: dict[str, Any]) -> None:
    for format_ in ("json", "text"):
        for shown in (False, True):
            stream = io.StringIO()
            logs.configure_logs(format_, "info", shown, stream)
            logs.log_event("x.y", **fields)
            # Without the time of the event, whose digits may be those of the vector.
            text = re.sub(r'"ts": "[^"]*"', "", stream.getvalue())
            secret = re.compile(r"Lovelace|Ada|0\.25|123456789")
            assert bool(secret.search(text)) == shown


def test_equal_values_have_equal_hashes(log: io.StringIO) -> None:
    for uri in ("a.png", "a.png", "b.png"):
        logs.log_event("image", uri=uri)
    a, again, b = (line["uri"] for line in lines(log))
    assert a == again != b
    assert a.startswith("h:")


def test_messages_and_exceptions_are_classes_and_places(log: io.StringIO) -> None:
    try:
        try:
            raise OSError(NAMES)
        except OSError as error:
            raise StorageError(f"cannot read {NAMES}") from error
    except StorageError:
        logs.get_logger("facepipe.x").exception("could not read %s", NAMES)
    (line,) = lines(log)
    assert (line["event"], line["error"], line["causes"]) == ("message", "StorageError", "OSError")
    assert line["at"].startswith("test_observe:")
    assert "test_observe.py" in line["stack"][-1]
    assert "Lovelace" not in log.getvalue()


def test_levels_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_logs()
    assert not logs.is_json()
    logs.log_event("quiet")
    logs.log_event("run.unrecorded", logging.WARNING, error=StorageError("x"))
    logs.report_failure("cannot read s3://key:pass@b/x", 1)
    assert capsys.readouterr().err.splitlines() == [
        "facepipe: warning: could not save the record of this run; its results are not affected error=StorageError",
        "facepipe: cannot read s3://***@b/x",
    ]
    logs.configure_logs("json")
    assert logs.is_json()
    logs.report_failure(NAMES, 2, ConfigError(NAMES))
    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["exit_code"], line["error"]) == ("command.failed", 2, "ConfigError")
    assert "message" not in line
    assert not any(name in json.dumps(line) for name in ("Ada", "Lovelace", "photos"))


def test_a_json_log_says_why_a_command_ended(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys and models in full, and a hash for each path, and for each value that may be a name."""
    logs.configure_logs("json")
    path = logs.hash_value("/photos/Ada/1.png")
    name = logs.hash_value("Ada Lovelace")
    for error, cause in (
        (ConfigError("detect.sise: unknown key; did you mean detect.size?"), None),
        (ModelError("no detector is called 'arcface'; registered are: mtcnn"), None),
        (ModelError("the weights '/photos/Ada/1.png' are missing"), f"the weights {path} are missing"),
        (StorageError("cannot read '/photos/Ada/1.png': no room"), f"cannot read {path}: no room"),
        (StorageError("cannot read /photos/Ada/1.png: no room"), f"cannot read {path}: no room"),
        (GalleryError("nobody is called 'Ada Lovelace'"), f"nobody is called {name}"),
        (GalleryError("the gallery's list lacks 'Ada Lovelace'"), f"the gallery's list lacks {name}"),
        (StorageError("s3://key:pass@b is gone"), f"{logs.hash_value('s3://***@b')} is gone"),
    ):
        logs.report_failure(str(error), 1, error)
        assert json.loads(capsys.readouterr().err)["cause"] == (cause or str(error))


@given(value=st.text(min_size=1).filter(lambda value: value.isprintable()), quote=st.sampled_from("'\""))
def test_nothing_of_a_quoted_value_is_left(value: str, quote: str) -> None:
    quoted = quote + value.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote
    hidden = logs.hide_values(f"x {quoted} y")
    assert re.fullmatch(r"x h:[0-9a-f]{12} y", hidden)
    assert logs.hide_values(f"x {value!r} y") == f"x {logs.hash_value(repr(value).strip(chr(39) + chr(34)))} y"


def test_a_run_in_the_log_names_no_image_and_nobody(
    log: io.StringIO, drawings: Path, fakes: Settings, tmp_path: Path
) -> None:
    broken = tmp_path / "corpus"
    broken.mkdir()
    (broken / "lovelace.png").write_bytes(b"no image")
    for path in sorted(drawings.rglob("*.png"))[::5]:  # of three persons
        os.makedirs(broken / path.parent.name, exist_ok=True)
        os.link(path, broken / path.parent.name / path.name)
    with record_run(str(tmp_path / "g"), "embed") as run:
        run.attach_summary(embed(broken, tmp_path / "g", fakes))
    with pytest.raises(StorageError), record_run(str(tmp_path / "g"), "clean"):
        storage.get_entry(str(broken / "person0" / "none.png"))
    text = log.getvalue() + "".join(path.read_text() for path in (tmp_path / "g" / "runs").glob("*.json"))
    assert '"images": 13' in text
    rows = Gallery(str(tmp_path / "g")).to_arrow(["uri", "identity"]).to_pylist()
    names = {Path(row["uri"]).name for row in rows} | {row["identity"] for row in rows if row["identity"]}
    assert len(names) >= 14
    for name in names | {"lovelace", "person", str(broken)}:
        assert name not in text


# Credentials

secrets_ = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/+=", min_size=8, max_size=40).filter(
    lambda s: len(set(s)) > 4
)
contexts = st.text(st.characters(codec="utf-8"), max_size=30)


@given(st.text(max_size=200))
@example("token: bearer x password=://a:b@c secret='AKIAAAAAAAAAAAAAAAAA")
@example("authorization: bearer a, b=c token = x ://k:v/w@h?sig=1")
def test_redacting_twice_changes_nothing(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


SECRET_KEYS = (
    *("secret", "aws_secret_access_key", "AWS_SESSION_TOKEN", "token", "password", "X-Amz-Signature", "sig"),
    *("X-Amz-Credential", "X-Amz-Security-Token", "api_key", "AccountKey", "Authorization"),
)


@given(
    *(st.sampled_from(SECRET_KEYS), contexts, secrets_, contexts),
    *(st.sampled_from(["", '"', "'"]), st.sampled_from(["=", ": ", " = "])),
)
@settings(max_examples=300)
def test_values_of_secret_keys_go(key: str, before: str, secret: str, after: str, quote: str, equals: str) -> None:
    found = redact(f"{before} {key}{equals}{quote}{secret}{quote} {after}")
    assert secret not in found.removeprefix(before).removesuffix(after)


@given(st.text("abcXYZ012._-", max_size=12), secrets_, st.text("abc012/", max_size=20))
def test_credentials_in_urls_go(user: str, secret: str, rest: str) -> None:
    for scheme in ("s3", "https", "redis"):
        found = redact(f"cannot open '{scheme}://{user}:{secret}@bucket/{rest}': denied")
        assert found == f"cannot open '{scheme}://***@bucket/{rest}': denied"


@given(contexts, st.from_regex(r"(AKIA|ASIA)[A-Z0-9]{16}", fullmatch=True), contexts)
def test_key_ids_go(before: str, key: str, after: str) -> None:
    assert key not in redact(f"{before} {key} {after}")


@given(st.text("abcdefghijklmnop 0123456789.,()/_-", max_size=80).filter(lambda t: not re.search("tok|pass|sig", t)))
def test_plain_text_stays(text: str) -> None:
    assert redact(text) == text
    assert redact(f"s3://bucket/{text}") == f"s3://bucket/{text}"


def test_secrets_of_the_environment_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtn+FEMI")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/aws/x")
    assert redact("said wJalr/XUtn+FEMI, wJalr%2FXUtn%2BFEMI") == f"said {HIDDEN}, {HIDDEN}"
    assert redact("no such file /var/run/aws/x") == "no such file /var/run/aws/x"


CRASH = """
import sys, threading
from facepipe.observe import logs
{configure}
logs.install_excepthook()
def fail():
    raise RuntimeError("s3://key:hunter22@bucket/Ada.png")
if {thread}:
    thread = threading.Thread(target=fail); thread.start(); thread.join()
else:
    fail()
"""


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("json_", [False, True])
def test_uncaught_exceptions_tell_no_credentials(json_: bool, thread: bool) -> None:
    code = CRASH.format(configure="logs.configure_logs('json')" if json_ else "", thread=thread)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == (0 if thread else 1)
    assert "hunter22" not in done.stderr
    if json_:
        line = json.loads(done.stderr)
        assert (line["event"], line["error"]) == ("uncaught", "RuntimeError")
        assert line["stack"][-1].endswith(" fail")
        assert "Ada" not in done.stderr
    else:
        assert "RuntimeError: s3://***@bucket/Ada.png" in done.stderr


def test_observing_is_light() -> None:
    code = (
        "import sys, facepipe.observe.logs, facepipe.observe.runs, facepipe.observe.metrics, pipelines.runtime.run_record\n"
        "print([m for m in ('ray', 'torch', 'faiss', 'pyarrow', 'numpy', 'deltalake') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert out.stdout.strip() == "[]"


# Metrics

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\\\|\\"|\\n)*",?)+)\})? (-?[0-9.e+-]+)')


def parsed(text: str) -> dict[str, dict[str, float]]:
    """Metrics by name and labels, after the format's rules were checked."""
    found: dict[str, dict[str, float]] = {}
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert kind == metrics.METRICS[name].type
            assert name not in found
            found[name] = {}
        elif not line.startswith("# HELP "):
            match = SAMPLE.fullmatch(line)
            assert match, line
            found[match[1]][match[2] or ""] = float(match[3])
    return found


def test_metrics_of_a_gallery(drawings: Path, fakes: Settings, tmp_path: Path) -> None:
    gallery, began = str(tmp_path / "g"), time.time()
    with record_run(gallery, "embed") as run:
        run.attach_summary(embed(drawings, gallery, fakes))
        run.add_seconds("commit", 0.5)
    with pytest.raises(ValueError, match="x"), record_run(gallery, "embed"):
        raise ValueError("x")
    with record_run(gallery, "erase") as run:
        run.add_count("erased_images", 4)
    text = metrics.render_metrics(gallery)
    found = parsed(text)
    who = f'gallery="{gallery}",job="embed"'
    assert found["facepipe_run_exit_code"] == {who: 1, f'gallery="{gallery}",job="erase"': 0}
    success = found["facepipe_run_last_success_timestamp_seconds"]
    assert int(began) <= success[who] <= time.time(), "a time of this run"
    assert success[who] <= found["facepipe_run_last_end_timestamp_seconds"][who]
    assert found["facepipe_run_erased_images"] == {f'gallery="{gallery}",job="erase"': 4}
    assert found["facepipe_gallery_images"] == {
        f'gallery="{gallery}",status="ok"': 40,
        f'gallery="{gallery}",status="no_face"': 20,
    }
    assert found["facepipe_gallery_faces"] == {f'gallery="{gallery}"': 60}
    assert found["facepipe_gallery_bytes"][f'gallery="{gallery}"'] > 1000
    assert "facepipe_index_faces" not in found
    with record_run(gallery, "embed") as run:
        run.attach_summary(embed(drawings, gallery, fakes))
        run.add_seconds("commit", 0.5)
    found = parsed(metrics.render_metrics(gallery))
    assert found["facepipe_run_phase_seconds"] == {f'{who},phase="commit"': 0.5}
    assert found["facepipe_run_faces"][who] == 0
    path = tmp_path / "facepipe.prom"
    metrics.write_metrics(str(path), text)
    assert path.read_text() == text
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".new"] == []
    with pytest.raises(StorageError, match="no such file"):
        metrics.write_metrics(str(tmp_path / "none" / "x.prom"), text)


def test_the_outermost_run_writes_the_metrics_file(log: io.StringIO, gallery: str, tmp_path: Path) -> None:
    path = tmp_path / "g.prom"
    set_metrics_file(str(path))
    try:
        with record_run(gallery, "nightly"):
            with record_run(gallery, "embed"):
                pass
            assert not path.exists()
        assert parsed(path.read_text())["facepipe_run_exit_code"].keys() == {
            f'gallery="{gallery}",job="{job}"' for job in ("embed", "nightly")
        }
        before = path.read_text()
        with record_run(str(tmp_path / "typo"), "embed"):
            pass
        assert path.read_text() == before
        set_metrics_file(str(tmp_path / "none" / "g.prom"))
        with record_run(gallery, "index"):
            pass
        assert lines(log)[-1]["event"] == "run.unmeasured"
    finally:
        set_metrics_file(None)


def test_large_galleries_are_not_scanned(
    drawings: Path, fakes: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = str(tmp_path / "g")
    summary = embed(drawings, gallery, fakes)
    monkeypatch.setattr(metrics, "COUNT_ROWS", 10)
    monkeypatch.setattr(Gallery, "counts", lambda self: pytest.fail("scanned"))
    assert "facepipe_gallery_images" not in parsed(metrics.render_metrics(gallery))
    with record_run(gallery, "nightly") as run:
        run.set_gallery_counts({"images": 60, "faces": 60, "ok": 40, "no_face": 20})
        run.set_versions(after=summary.version)
    assert f'facepipe_gallery_images{{gallery="{gallery}",status="ok"}} 40.0\n' in metrics.render_metrics(gallery)
    monkeypatch.setattr(metrics, "COUNT_ROWS", 10**6)  # the count is of this very version
    assert f'facepipe_gallery_images{{gallery="{gallery}",status="ok"}} 40.0\n' in metrics.render_metrics(gallery)


def test_metrics_of_an_index_and_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from facepipe.index import manifest

    assert metrics.render_metrics(str(tmp_path)) == ""

    class Found:
        live, deleted = 12, 3

    monkeypatch.setattr(manifest, "exists", lambda path: True)
    monkeypatch.setattr(manifest, "load", lambda path: Found)
    found = parsed(metrics.render_metrics(str(tmp_path)))
    assert found["facepipe_index_faces"] == {f'gallery="{tmp_path}"': 12}
    assert found["facepipe_index_dead"] == {f'gallery="{tmp_path}"': 3}


@given(st.text(max_size=40), st.floats(allow_nan=False, allow_infinity=False))
def test_the_format_holds_any_label_and_value(label: str, value: float) -> None:
    sample = metrics.MetricSample("facepipe_gallery_faces", (label,), value)
    text = metrics.render_samples([sample])
    (line,) = [line for line in text.split("\n") if line and not line.startswith("#")]
    text_of = line[line.index('"') + 1 : line.rindex('"')]
    unescaped = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), text_of)
    assert unescaped == label.encode("utf-8", "replace").decode()
    assert float(line.rsplit(" ", 1)[1]) == value


def test_labels_hold_no_credentials() -> None:
    assert metrics.get_gallery_label("s3://AKIAIOSFODNN7EXAMPLE:wJalr/K7@bucket/g/?token=x") == "s3://***@bucket/g"
    assert metrics.get_gallery_label("a/") == os.path.abspath("a")


def test_every_metric_is_in_the_docs() -> None:
    text = (REPOSITORY / "docs" / "observability.md").read_text()
    for name, metric in metrics.METRICS.items():
        assert f"`{name}`" in text
        assert metric.help.endswith(".")


# Ray

RAY = """
import os, sys, time, urllib.request
os.environ |= {"RAY_METRICS_EXPORT_INTERVAL_MS": "500", "RAY_BACKEND_LOG_LEVEL": "fatal"}
import ray
from facepipe.gallery.commits.parts import PartRecord
from pipelines.runtime import ray_metrics
ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, logging_level="error", log_to_driver=False)

@ray.remote
class Worker:
    def work(self):
        for n in range(2):
            ray_metrics.count_block(PartRecord(n, statuses={"ok": 3, "no_face": 1}, faces=5, seconds={"detect": 0.5}))
        return ray_metrics._create_counters.cache_info().currsize

worker = Worker.remote()
print("counters", ray.get(worker.work.remote()))
node, text = ray.nodes()[0], ""
for _ in range(150 if sys.argv[1] == "agent" else 0):
    time.sleep(1)
    address = "http://{}:{}/metrics".format(node["NodeManagerAddress"], node["MetricsExportPort"])
    try:
        text = urllib.request.urlopen(address, timeout=5).read().decode()
    except OSError:
        continue
    if all(f"ray_facepipe_{name}_total{{" in text for name in ("stage_seconds", "images", "faces")):
        break
print("\\n".join(line for line in text.splitlines() if line.startswith("ray_facepipe")))
ray.shutdown()
"""


@pytest.mark.slow
def test_live_metrics_on_ray() -> None:
    """The endpoint needs the packages of ray[default]; counting needs none of them."""
    agent = all(find_spec(name) for name in ("prometheus_client", "opencensus", "aiohttp", "opentelemetry"))
    command = [sys.executable, "-c", RAY, "agent" if agent else "none"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "counters 1" in done.stdout
    if not agent:
        return
    values = re.findall(
        r"^(ray_facepipe_\w+)\{(?:.*,)?(status=\"\w+\"|stage=\"\w+\"|)?\} ([0-9.]+)$", done.stdout, re.M
    )
    found = {(name, label): float(value) for name, label, value in values}
    assert found["ray_facepipe_images_total", 'status="ok"'] == 6
    assert found["ray_facepipe_images_total", 'status="no_face"'] == 2
    assert found["ray_facepipe_stage_seconds_total", 'stage="detect"'] == 1
    assert "ray_facepipe_faces_total{" in done.stdout


def test_no_counter_outside_ray() -> None:
    code = (
        "import sys; from facepipe.gallery.commits.parts import PartRecord; from pipelines.runtime import ray_metrics\n"
        "ray_metrics.count_block(PartRecord(0, statuses={'ok': 1})); print('ray' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert out.stdout.strip() == "False"
    ray_metrics.count_block(PartRecord(0, statuses={"ok": 1}))
