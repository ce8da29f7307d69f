"""Training with torch: data, losses, the loop. Nothing here knows of Ray; the same code runs in one process or many."""
