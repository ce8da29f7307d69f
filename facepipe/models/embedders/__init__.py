"""Embedding networks, by the names and shapes of their papers."""
