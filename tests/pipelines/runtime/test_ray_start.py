"""Ray is started again if its processes took too long to start, and every other error is told at once."""

from typing import Any

import pytest

from pipelines.runtime.runners.ray import _start_patiently

ray = pytest.importorskip("ray")

TIMED_OUT = "The current node timed out during startup. This could happen because the GCS has become overloaded."


class Starts:
    """Stands in for `ray.init`: fails with each of some messages, and then starts."""

    def __init__(self, *messages: str) -> None:
        self.messages = list(messages)
        self.count = 0

    def __call__(self, **options: Any) -> None:
        self.count += 1
        if self.messages:
            raise Exception(self.messages.pop(0))


@pytest.mark.parametrize(
    ("messages", "count", "is_started"),
    [
        ([], 1, True),
        ([TIMED_OUT], 2, True),
        ([TIMED_OUT] * 2, 3, True),
        ([TIMED_OUT] * 3, 3, False),
        (["no such address"], 1, False),
        ([TIMED_OUT, "no such address"], 2, False),
    ],
)
def test_ray_starts_at_the_third_try_at_the_latest(
    monkeypatch: pytest.MonkeyPatch, messages: list[str], count: int, is_started: bool
) -> None:
    starts = Starts(*messages)
    stops: list[int] = []
    monkeypatch.setattr(ray, "init", starts)
    monkeypatch.setattr(ray, "shutdown", lambda: stops.append(starts.count))
    if is_started:
        _start_patiently({})
    else:
        with pytest.raises(Exception, match=messages[-1][:15]):
            _start_patiently({})
    assert starts.count == count
    assert stops == list(range(1, count)), "what has started ends before the next try"
