"""Who calls the workers: this process, a pool of processes on this machine, or Ray."""
