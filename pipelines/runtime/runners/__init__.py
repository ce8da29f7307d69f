"""Runners, which call the workers: in this process, in a pool of processes on this machine, or on Ray."""
