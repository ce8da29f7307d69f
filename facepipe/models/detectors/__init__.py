"""Detectors: their networks, and what stands around them."""
