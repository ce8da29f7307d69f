"""The pipelines: one module each, `run(config) -> Summary`. The only floor that knows of Ray."""
