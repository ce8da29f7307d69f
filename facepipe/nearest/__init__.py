"""Exact nearest neighbours and joins over vectors, on CPUs and GPUs."""
