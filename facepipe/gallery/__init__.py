"""The gallery: a Delta table of faces, its model contract, its commits, and the checks on it."""

from facepipe.gallery.contract import Contract
from facepipe.gallery.table import Gallery

__all__ = ["Contract", "Gallery"]
