"""Detectors and embedders: networks, weights, engines and cards. Importing this package loads no framework.

This folder holds what all models share. `detectors`, `embedders` and `dlib` hold the models, `runtime` runs them, and
`zoo` puts them together: the registry, TOML cards, loading and export.
"""
