"""A prefix of an object store: s3://bucket/prefix. The listing streams, and brings sizes and etags with it."""

from collections.abc import Iterator

from facepipe.sources.expand import Expander
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import WorkItem
from facepipe.storage import list_prefix, split_url


class ObjectStoreSource:
    """Every image (and tar shard) under a prefix.

    Attributes:
        url: URL of the prefix.
        name: Name of the source.
    """

    def __init__(self, url: str, identity: IdentityRule = "auto", name: str | None = None):
        self.url = url
        bucket, key = split_url(url)
        self._base = f"{bucket}/{key}".rstrip("/") + "/"
        self.name = name or url
        self._expander = Expander(identity)

    @property
    def ignored(self) -> int:
        """Number of objects passed over so far because they are not images."""
        return self._expander.ignored

    def __iter__(self) -> Iterator[WorkItem]:
        self._expander.ignored = 0
        for entry in list_prefix(self.url):
            relative = entry.url.removeprefix(self._base)
            yield from self._expander.expand_file(entry.url, relative, entry.fingerprint)
