"""What a run would find in a source, counted without reading an image: for dry runs."""

from facepipe.gallery.known import KnownImages
from facepipe.sources import Source
from facepipe.sources.blocks import BlockSize, cut_blocks

Counts = dict[str, int]
VERDICTS = ("new", "changed", "skipped", "repeated", "erased")


def count_listed(source: Source, known: KnownImages) -> Counts:
    """Count the images of a source by what `embed` would do with them.

    Args:
        source: the source.
        known: images of the gallery.

    Returns:
        Images by verdict, those whose label at the source is another one as `relabelled`, and files that are not images
        as `ignored`.
    """
    counts = dict.fromkeys((*VERDICTS, "relabelled", "ignored"), 0)
    for block in cut_blocks(source, known, BlockSize(), find_erased=known.find_erased):
        # An image with a previous fingerprint is in the gallery with other content.
        changed = block.items.num_rows - block.items["previous"].null_count
        counts["changed"] += changed
        counts["new"] += block.items.num_rows - changed
        counts["skipped"] += block.skipped
        counts["repeated"] += block.repeated
        counts["erased"] += block.erased
        counts["relabelled"] += block.relabelled.num_rows if block.relabelled is not None else 0
        counts["ignored"] += block.ignored
    return counts
