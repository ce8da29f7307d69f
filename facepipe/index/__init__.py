"""The search index of a gallery: sharded faiss indexes, published by a manifest."""
