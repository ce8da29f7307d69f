"""Embedding networks, with the names and shapes of their papers, and the engines that run them."""
