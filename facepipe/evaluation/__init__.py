"""Figures of merit: verification on pairs."""
