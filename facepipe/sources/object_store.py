"""A prefix of an object store: s3://bucket/prefix. The listing streams, and brings sizes and etags with it."""

from collections.abc import Iterator

from facepipe.sources.expand import Expander
from facepipe.sources.identity import IdentityRule
from facepipe.sources.item import WorkItem
from facepipe.storage import list_prefix, split_url


class ObjectStoreSource:
    """Every image (and tar shard) under a prefix."""

    def __init__(self, url: str, identity: IdentityRule = "auto", name: str | None = None):
        self.url = url
        bucket, key = split_url(url)
        self._base = f"{bucket}/{key}".rstrip("/") + "/"
        self.name = name or url
        self._expand = Expander(identity)

    @property
    def ignored(self) -> int:
        return self._expand.ignored

    def __iter__(self) -> Iterator[WorkItem]:
        self._expand.ignored = 0
        for found in list_prefix(self.url):
            yield from self._expand(found.url, found.url.removeprefix(self._base), found.fingerprint)
