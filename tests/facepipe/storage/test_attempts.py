"""Attempts of one job: the later one takes over at once, and the earlier one writes no more."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import embed, run_facepipe

from facepipe import storage
from facepipe.errors import GalleryBusyError
from facepipe.gallery import Gallery
from facepipe.storage import attempts
from facepipe.storage import lease as leases
from facepipe.storage.attempts import Attempt, register_attempt
from facepipe.storage.lease import hold_lease


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_current", Attempt())
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "g")
    request.getfixturevalue("bucket")
    return "s3://faces/g"


def begin(place: str, monkeypatch: pytest.MonkeyPatch, submission: str = "", job: str = "") -> Attempt:
    """Register as another process would."""
    monkeypatch.setattr(attempts, "_current", Attempt())
    config = json.dumps({"metadata": {"job_submission_id": submission}}) if submission else "{}"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
    monkeypatch.setenv("FACEPIPE_JOB", job)
    return register_attempt(storage.join(place, "runs"))


def test_attempts_are_counted_in_the_order_in_which_they_begin(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert begin(place, monkeypatch, "facepipe-nightly-x7k2p-abcde") == Attempt("facepipe-nightly-x7k2p", 1)
    assert begin(place, monkeypatch, "facepipe-nightly-x7k2p-fghij") == Attempt("facepipe-nightly-x7k2p", 2)
    assert begin(place, monkeypatch, "facepipe-nightly-x7k2p-abcde").number == 1, "it is known again"
    assert begin(place, monkeypatch, "facepipe-nightly-other-abcde").number == 1, "another night is another job"
    assert begin(place, monkeypatch, job="dag 2026-12-01") == Attempt("dag 2026-12-01", 1)
    assert begin(place, monkeypatch) == Attempt()
    path = storage.join(place, "runs", "attempts.json")
    storage.write(path, b"no register")
    assert begin(place, monkeypatch, "facepipe-nightly-x7k2p-fghij").number == 1
    for number in range(60):
        begin(place, monkeypatch, job=f"job {number}")
    assert len(json.loads(storage.read(path))) == 20


def test_a_later_attempt_takes_over_and_the_earlier_one_knows(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(place, monkeypatch, job="night")
    said: list[str] = []
    with hold_lease(place) as first:
        begin(place, monkeypatch, "night-abcde", job="night")
        with hold_lease(place, on_wait=said.append) as second:
            assert not second.is_settled, "commits of the first are fenced off before the second trusts the table"
            with pytest.raises(GalleryBusyError, match="lost"):
                first.renew()
            second.renew()
    assert any("taking over the gallery from an earlier attempt" in line for line in said)
    # The earlier attempt gets nothing back, although nobody holds the lease any more.
    monkeypatch.setattr(attempts, "_current", Attempt("night", 1))
    with pytest.raises(GalleryBusyError, match="a later attempt of this job has taken over"), hold_lease(place):
        pass
    # Another job is not concerned.
    monkeypatch.setattr(attempts, "_current", Attempt())
    with hold_lease(place):
        pass


@pytest.mark.parametrize("other", [Attempt(), Attempt("other", 9), Attempt("night", 1)])
def test_other_jobs_and_the_same_attempt_are_refused(
    other: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_current", Attempt("night", 1))
    with hold_lease(str(tmp_path / "g")):
        monkeypatch.setattr(attempts, "_current", other)
        with pytest.raises(GalleryBusyError, match="another run"), hold_lease(str(tmp_path / "g")):
            pass


def test_a_retried_night_goes_on_beside_the_first_attempt(
    drawings: Path, fakes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is another process that holds the night's lease and does not answer."""
    embed(drawings / "person0", tmp_path / "g", fakes)
    text = '[detect]\nmodel = "fake-detector"\n[embed]\nmodel = "fake-embedder"\n[run]\nrunner = "inline"\n'
    (tmp_path / "night.toml").write_text(f'gallery = "g"\n[[source]]\nuri = "{drawings}/person1"\nname = "p"\n{text}')
    code = (
        "import sys, time\nfrom facepipe.storage.attempts import register_attempt\n"
        "from facepipe.storage.lease import hold_lease\n"
        "register_attempt(sys.argv[1] + '/runs')\n"
        "with hold_lease(sys.argv[1] + '/runs', 'nightly job') as lease:\n    print('held', flush=True)\n"
        "    while True:\n        time.sleep(0.2)\n        lease.renew()\n"
    )
    environment = {**os.environ, "FACEPIPE_JOB": "facepipe-nightly-x7k2p", "FACEPIPE_LEASE_SECONDS": "600"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "g")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        # A run of another job is refused; the next attempt of this one is not.
        assert run_facepipe("nightly", tmp_path / "night.toml", "--quiet")[0] == 1
        config = json.dumps({"metadata": {"job_submission_id": "facepipe-nightly-x7k2p-fghij"}})
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", config)
        code, _, err = run_facepipe("nightly", tmp_path / "night.toml", "--quiet")
        assert code == 0, err
        # The first attempt notices it at its next heartbeat, and ends.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.poll() == 1
        assert process.stderr is not None
        assert "GalleryBusyError" in process.stderr.read()
    assert Gallery(str(tmp_path / "g")).counts()["images"] == 40


def test_leases_of_older_versions_have_no_job(tmp_path: Path) -> None:
    with hold_lease(str(tmp_path / "g")):
        values = json.loads((tmp_path / "g" / ".lock").read_text())
    for name in ("job", "attempt"):
        del values[name]
    assert leases._decode(json.dumps(values).encode()) is not None
