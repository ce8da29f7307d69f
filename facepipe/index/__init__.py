"""Sharded FAISS indexes over a gallery: planned, trained, built, updated, searched and measured here."""
