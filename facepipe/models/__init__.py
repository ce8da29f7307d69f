"""Detectors and embedders: own modules, real weights, a registry. Importing this loads no framework."""

from facepipe.models.cards import CARDS, Card, card
from facepipe.models.protocols import Detector, Embedder, Faces

__all__ = ["CARDS", "Card", "Detector", "Embedder", "Faces", "card"]
