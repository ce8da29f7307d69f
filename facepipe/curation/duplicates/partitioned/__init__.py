"""Find duplicates partition by partition, so that no step holds all images, and none an object per image.

    faces by range of uri      -> images, numbered in the order of uris
    images by content          -> links of the same bytes
    images by hash             -> the first of each hash, and links to it
    hashes by block of bits    -> links of hashes that nearly agree
    connected components of all links, with those of near faces
    linked images by component -> what is kept of each, pairs, groups

Whatever is a copy of an image is in its component, so that each is judged by itself, as a whole gallery would be. The
result does not depend on the number of partitions, nor on where they are handled.
"""

from facepipe.curation.duplicates.partitioned.search import (
    NodeCopies,
    find_copies_by_partition,
    find_duplicates_by_partition,
)
from facepipe.curation.duplicates.partitioned.tables import CopySearch, CopySource

__all__ = ["CopySearch", "CopySource", "NodeCopies", "find_copies_by_partition", "find_duplicates_by_partition"]
