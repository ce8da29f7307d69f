"""What people act on: the face graph, duplicates, clusters and noisy labels."""
