"""What runs the models: devices, sessions, batches, CUDA graphs, transfers, precision and preprocessing."""
