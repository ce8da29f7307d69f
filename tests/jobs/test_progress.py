"""Progress on stderr: lines a few seconds apart, messages at once, nothing if it is not wanted."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from facepipe.config import build
from facepipe.observe import logs
from jobs import progress
from jobs.progress import ProgressReporter, format_failed, format_share
from pipelines.embed import EmbedConfig, run


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


def test_a_bar_shows_the_step_and_takes_no_name_for_markup(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a night compared pictures below a bar that said `30 images`, and a source `staff[/2024]` ended it."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    with ProgressReporter("nightly", clock=clock) as reporter:
        reporter.update("30 images", completed=30, total=30)
        reporter.show_step("embed staff[/2024] of a source with a name that is longer than a line of the terminal")
        bar = reporter._bar
        assert bar is not None
        assert bar.tasks[0].total is None
        bar.refresh()
    last = screen.getvalue().rpartition("\n")[0].splitlines()[-1]
    assert "nightly" in last, "what is too long is cut, and nothing else"
    assert "embed staff[/2024]" in last


def test_failed_images_are_named() -> None:
    examples = [("photos/a [1].jpg", "decode_error", "empty file"), ("b.jpg", "crashed", "")]
    assert (
        format_failed(7, examples) == "7 images, such as photos/a [1].jpg (decode_error: empty file), b.jpg (crashed)"
    )
    assert format_failed(1, []) == "1 image"


def test_json_logs_have_an_event_per_minute(
    json_logs: None, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    with ProgressReporter("embed", clock=clock) as reporter:
        for second in range(0, 200, 10):
            clock.now = float(second)
            reporter.update("Ada's photos", completed=second, total=400)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line["command"], line["completed"], line["total"]) for line in lines] == [
        ("run.progress", "embed", done, 400) for done in (60, 120, 180)
    ]


@pytest.mark.parametrize(
    ("completed", "total", "seconds", "expected"),
    [
        (120, 480, 63.4, "120 of 480 (25%), 0:03:10 left"),
        (0, 480, 0.0, "0 of 480 (0%), 0:00:00 left"),
        (1_000_000, 100_000_000, 36_000.0, "1,000,000 of 100,000,000 (1%), 990:00:00 left"),
        (480, 480, 10.0, "480 of 480 (100%), 0:00:00 left"),
        (490, 480, 10.0, "490 of 480 (102%), 0:00:00 left"),
    ],
)
def test_a_share_says_what_is_left(completed: int, total: int, seconds: float, expected: str) -> None:
    assert format_share(completed, total, seconds) == expected


def test_embed_tells_its_total_once_the_source_is_listed(drawings: Path, tmp_path: Path) -> None:
    """Also when some images are in the gallery already."""
    models = {"detect": {"model": "fake-detector"}, "embed": {"model": "fake-embedder"}}
    config = build(EmbedConfig, models, {"source": {"uri": str(drawings)}, "run": {"runner": "local", "workers": 1}})
    shown: list[tuple[int, int]] = []
    summary = run(config, str(tmp_path / "g"), lambda embedded: shown.append((embedded.total, embedded.listed)))
    assert summary.total == summary.listed == 60
    assert {total for total, _ in shown} <= {0, 60}
    assert run(config, str(tmp_path / "g")).total == 60
