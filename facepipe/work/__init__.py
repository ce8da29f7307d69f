"""Cutting a source into blocks of work, and remembering what was in hand when a worker died."""
