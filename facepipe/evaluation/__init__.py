"""Measure quality: verification, identification, indexes, clusters and cleaned labels."""
