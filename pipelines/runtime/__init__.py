"""How work is run: plan, worker, run records, crash marks and workspaces."""
