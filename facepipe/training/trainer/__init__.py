"""The training loop and what it needs: schedule, optimiser, mixed precision, ranks, state and checkpoints."""
