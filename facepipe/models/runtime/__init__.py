"""What runs the models: devices, batches, CUDA graphs, transfers and precision."""
