"""What a run leaves for those who watch it: a record in the gallery, structured logs, metrics."""
