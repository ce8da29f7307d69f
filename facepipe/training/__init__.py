"""Training with torch: data, losses and the loop. It does not use Ray: the same code runs in one process or many."""

from facepipe.extras import require_module

require_module("torch", "training")
