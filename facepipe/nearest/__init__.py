"""Exact nearest neighbours and joins over vectors, on CPUs and GPUs.

The layers, from the bottom: `faiss_engine` and `half_precision`; `distances` and `similarity`, which both sides share;
`upload` and `top_k`; `knn_gpu` and `join_gpu`; and `join`, which picks the device.
"""
