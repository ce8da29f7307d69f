"""How long the phases of a run took."""

import time


class Phases:
    """Books the seconds since it was made, or since the last phase ended, into a mapping."""

    def __init__(self, seconds: dict[str, float]):
        self._seconds, self._began = seconds, time.monotonic()

    def end(self, phase: str) -> None:
        """The phase ends now, and the next begins."""
        now = time.monotonic()
        self._seconds[phase], self._began = round(now - self._began, 3), now
