"""Progress on stderr: lines a few seconds apart, messages at once, nothing if it is not wanted."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from facepipe.observe import logs
from jobs import progress
from jobs.progress import ProgressReporter


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def json_logs() -> Iterator[None]:
    logs.configure_logs("json")
    yield
    logs.configure_logs("text")


def test_lines_are_five_seconds_apart(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("embed", clock=clock) as reporter:
        for second in range(13):
            clock.now = float(second)
            reporter.update(f"{second} images")
    assert capsys.readouterr().err.splitlines() == ["embed: 5 images", "embed: 10 images"]


def test_the_first_line_may_come_at_once(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("train", show_first=True, clock=clock) as reporter:
        reporter.update("step 1")
        reporter.update("step 2")
    assert capsys.readouterr().err.splitlines() == ["train: step 1"]


def test_messages_are_not_throttled(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("nightly", clock=clock) as reporter:
        reporter.log("embed")
        reporter.log("index")
    assert capsys.readouterr().err.splitlines() == ["nightly: embed", "nightly: index"]


def test_quiet_prints_nothing(clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("embed", quiet=True, show_first=True, clock=clock) as reporter:
        reporter.update("1 image")
        reporter.log("a message")
    assert capsys.readouterr() == ("", "")


def test_json_logs_stay_json(json_logs: None, clock: FakeClock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter("search", show_first=True, clock=clock) as reporter:
        reporter.update("1 query")
        reporter.log("a message")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    with ProgressReporter("train", clock=clock) as reporter:
        reporter.update("step 1 of 4", completed=1, total=4)
        reporter.log("score 0.9")
    assert "train: score 0.9" in screen.getvalue()
    assert "step 1 of 4" in screen.getvalue()
