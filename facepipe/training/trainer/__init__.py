"""The training loop and its parts: settings, schedule, optimiser, mixed precision, ranks, checkpoints and metrics."""
