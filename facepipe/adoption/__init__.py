"""Encodings that other programs made: read their tables, check their rows, adopt them into a gallery."""
