"""What a run leaves for its operators: a record in the gallery, structured logs and metrics."""
