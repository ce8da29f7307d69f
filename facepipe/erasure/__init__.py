"""Taking people out of a gallery for good: rows, vectors, thumbnails, pages; with a receipt, and proof."""
