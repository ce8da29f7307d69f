"""Clusterings of a graph of faces: who is one person."""
