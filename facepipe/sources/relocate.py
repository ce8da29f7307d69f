"""From the uri in a gallery back to the work item: where the image's bytes are now."""

import os

from facepipe.sources.item import WorkItem
from facepipe.sources.members import list_container, locate_container, split_member


class ImageLocator:
    """Locates images by their uris. The listing of the last container is kept.

    An image that is no longer in its container gets an item that says so, and with it a status when it is read.
    """

    def __init__(self) -> None:
        self._container = ""
        self._members: dict[str, WorkItem] = {}

    def locate_image(self, uri: str, fingerprint: str | None = None) -> WorkItem:
        """Locate an image; its item has no label.

        Args:
            uri: the uri of the image.
            fingerprint: the fingerprint of its file when it was listed.
        """
        member = split_member(uri)
        if member is None:
            return WorkItem(uri, locate_container(uri), fingerprint=fingerprint)
        container = member[0]
        # Neighbouring uris are mostly of the same container, so the last listing is kept.
        if container != self._container:
            items = list_container(os.fsdecode(locate_container(container)))
            self._members = {item.uri: item for item in items}
            self._container = container
        missing = WorkItem(uri, locate_container(container), listing_error="no longer in its container")
        return self._members.get(uri, missing)._replace(identity=None)
