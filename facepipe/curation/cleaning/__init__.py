"""Noisy identity labels: who each face is, how sure that is, and what to do about it."""
