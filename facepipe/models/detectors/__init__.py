"""Detectors: their networks, weights, engines and decoding."""
