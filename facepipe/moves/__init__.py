"""Images that are elsewhere than they were: told from new ones by name where that is possible, else by content.

A moved image keeps its rows, with their face ids and vectors, under its new uri.
"""
