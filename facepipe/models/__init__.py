"""Detectors and embedders: own modules, real weights, a registry. Importing this loads no framework."""

from facepipe.models.card import Card
from facepipe.models.protocols import Detector, Embedder, Faces
from facepipe.models.registry import CARDS, card, chip_layout

__all__ = ["CARDS", "Card", "Detector", "Embedder", "Faces", "card", "chip_layout"]
