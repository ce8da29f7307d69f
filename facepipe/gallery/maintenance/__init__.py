"""Upkeep of a gallery: join small files, delete old ones, verify what is there."""
