"""A prefix of an object store: s3://bucket/prefix. The listing streams by ranges of keys, with sizes and etags."""

from collections.abc import Collection, Iterator
from functools import partial

from facepipe.sources.ahead import Listed, list_ahead
from facepipe.sources.expand import Expander
from facepipe.sources.extensions import ARCHIVE_EXTENSIONS, get_extension
from facepipe.sources.item import WorkItem
from facepipe.sources.selection import SYSTEM_FOLDER
from facepipe.storage import list_prefix_in_ranges, split_url

# Archives that are listed at a time: one stream of a store gives less than what its network can.
_ARCHIVES = 4


class ObjectStoreSource:
    """Every image (and tar shard) under a prefix.

    Attributes:
        url: URL of the prefix.
        name: Name of the source.
    """

    has_labels = None  # labels come from folders' names, or stand beside the images

    def __init__(self, url: str, expander: Expander | None = None, name: str | None = None):
        self.url = url
        bucket, key = split_url(url)
        self._base = f"{bucket}/{key}".rstrip("/") + "/"
        self.name = name or url
        self._expander = expander or Expander()
        self._passed_over = self._expander.passed_over

    @property
    def ignored(self) -> int:
        """Number of objects passed over so far."""
        return self._passed_over.total

    @property
    def other_folders(self) -> Collection[str]:
        """Folders right below the prefix, with images that patterns leave out; two at most."""
        return self._passed_over.folders

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was passed over."""
        return self._passed_over.describe()

    def __iter__(self) -> Iterator[WorkItem]:
        self._passed_over.clear()
        return list_ahead(self._list_entries(), _ARCHIVES)

    def _list_entries(self) -> Iterator[Listed]:
        """Yield the objects that patterns take."""
        for entry in list_prefix_in_ranges(self.url):
            relative = entry.url.removeprefix(self._base)
            selection = self._expander.selection
            reason = selection.reject_folders(relative)
            if reason is None and not selection.takes_all_files:
                reason = self._expander.reject_file(relative)
            if reason is not None:
                self._passed_over.add(reason)
                if reason != SYSTEM_FOLDER:
                    self._passed_over.note_folder(relative)
                continue
            is_archive = get_extension(relative) in ARCHIVE_EXTENSIONS
            yield Listed(partial(self._expander.expand_file, entry.url, relative, entry.fingerprint), is_archive)
