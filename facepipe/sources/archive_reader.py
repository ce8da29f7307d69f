"""What the readers of archives have in common: how members get labels, and which of them are listed."""

from facepipe.sources.identity import Identify
from facepipe.sources.selection import PassedOver, Selection


class ArchiveReader:
    """A reader of archives of one kind."""

    def __init__(self, identify: Identify, selection: Selection | None = None, passed_over: PassedOver | None = None):
        """Make a reader.

        Args:
            identify: makes an identity from a member's name and its label.
            selection: which members are listed; by default all but those in folders of systems.
            passed_over: counts the members that are not listed.
        """
        self._identify = identify
        self._selection = selection or Selection()
        self._passed_over = passed_over or PassedOver()
