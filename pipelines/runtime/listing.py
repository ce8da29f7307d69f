"""What a listing would bring, counted and not read: for dry runs."""

from facepipe.gallery.known import KnownImages
from facepipe.sources import Source
from facepipe.sources.blocks import BlockSize, cut_blocks

Counts = dict[str, int]
VERDICTS = ("new", "changed", "skipped", "repeated", "erased")


def count_listed(source: Source, known: KnownImages) -> Counts:
    """What `embed` would find in a source: images by what would be done with them."""
    counts = dict.fromkeys((*VERDICTS, "ignored"), 0)
    for block in cut_blocks(source, known, BlockSize()):
        changed = block.items.num_rows - block.items["previous"].null_count
        counts["changed"] += changed
        counts["new"] += block.items.num_rows - changed
        for name in ("skipped", "repeated", "erased", "ignored"):
            counts[name] += getattr(block, name)
    return counts
