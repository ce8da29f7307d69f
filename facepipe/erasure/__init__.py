"""Deleting a person's data: rows, vectors, thumbnails and report entries; with a receipt, and a check of it."""
